def test_x(make_model,make_engine_of):
    import conftest
    for n in ["qwen2", "qwen2-tied", "qwen2-eager", "llama", "mistral", "gemma2", "gemma3_text", "gpt2", "bloom"]:
        e=make_engine_of(*make_model(n)); from iiverl_core.rollout.hf.cache import RowCache
        c=RowCache(e._model); print(n,e._model.config._attn_implementation,e._direct_mask,c.keeps_all,[type(l).__name__ for l in c.layers])
