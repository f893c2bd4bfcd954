import torch, time
from tests.test_engine_model import *
from tests.test_engine_model import adapters
def test_fused(tiny_base, adapters):
    t=time.time()
    runner = ModelRunner(engine_settings(tiny_base, engine_max_batch=4), kernels=True)
    print("init", time.time()-t)
    assert runner._gpu is not None
    found = registry(runner)
    for name in ("small", "full"): found.load(name, adapters[name])
    rs = [greedy(prompt(n, i), found, a, 4) for i,(n,a) in enumerate([(5,None),(20,"small"),(9,"full")])]
    t=time.time()
    generate(runner, rs, max_batch=4, max_step_tokens=16)
    print("gen", time.time()-t)
    for r in rs:
        assert r.output_ids == peft_greedy(tiny_base, adapters.get(r.key), r.prompt_ids, 4), r.key
