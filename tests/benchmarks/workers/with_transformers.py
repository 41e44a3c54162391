"""transformers' ``generate`` with its key/value cache, the completions by ``num_return_sequences`` or by repeated
prompts, whichever was faster in the warm-up."""

import json
import os
import time

import torch
import transformers
from serve import arguments, serve

options = arguments()
torch.set_num_threads(len(os.sched_getaffinity(0)))
model = transformers.Qwen2ForCausalLM.from_pretrained(options.checkpoint, dtype=torch.float32).eval()
model.generation_config.eos_token_id = None
prompt_BS = torch.tensor(json.loads(options.prompts.read_text()))


def generate(seed: int, greedy: bool, repeated: bool) -> list[list[int]]:
    torch.manual_seed(seed)
    inputs = prompt_BS.repeat_interleave(options.group, dim=0) if repeated else prompt_BS
    sampling = {} if greedy else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    with torch.inference_mode():
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=not greedy,
            num_return_sequences=1 if repeated else options.group,
            max_new_tokens=options.new_tokens,
            pad_token_id=0,
            use_cache=True,
            **sampling,
        )
    return output[:, prompt_BS.shape[1] :].tolist()


def seconds(repeated: bool) -> float:
    generate(0, False, repeated)
    started = time.perf_counter()
    generate(1, False, repeated)
    return time.perf_counter() - started


faster = seconds(True) < seconds(False)


def sample(seed: int, greedy: bool) -> list[list[int]]:
    return generate(seed, greedy, repeated=faster or greedy)  # greedy search refuses several sequences


serve(
    sample,
    {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "completions by": "repeated prompts" if faster else "num_return_sequences",
    },
)
