"""Short programs that train with gpuadam: `python -m gpuadam.examples` lists them."""
