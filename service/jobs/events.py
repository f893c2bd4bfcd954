from service.db import Database


class EventHub:
    def __init__(self, db: Database) -> None:
        self.db = db

    async def close(self) -> None:
        return None
