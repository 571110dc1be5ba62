"""Runs inside the llama.cpp venv: serves a GGUF file on loopback in float32 throughout.

Usage: python llama_serve.py MODEL.gguf PORT
"""

import sys
import time

import xllamacpp

parameters = xllamacpp.CommonParams()
parameters.model.path = sys.argv[1]
parameters.hostnames = ["127.0.0.1"]
parameters.port = int(sys.argv[2])
parameters.model_alias = {"t"}
parameters.cache_type_k = parameters.cache_type_v = (
    xllamacpp.ggml_type.GGML_TYPE_F32
)  # the default KV cache is half precision
parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
parameters.n_ctx = 1024
parameters.n_parallel = 1
parameters.warmup = False
parameters.cpuparams.n_threads = 1
server = xllamacpp.Server(parameters)
print("listening", server.listening_address, flush=True)
while True:
    time.sleep(3600)
