"""How fast the engine and the job are on a GPU: ``python -m benchmarks.gpu``. Needs no download."""
