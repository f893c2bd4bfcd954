"""lorry's HTTP side: the application, specs, rows and the queue. Never imports torch, nor worker."""

__version__ = "0.1.0"
