"""Writes a Qwen2 checkpoint of random weights: ``write_checkpoint.py FOLDER CONFIG_AS_JSON SEED``."""

import json
import sys

import torch
import transformers

folder, config, seed = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(seed)
transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**config)).save_pretrained(folder)
