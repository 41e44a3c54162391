"""Whole steps of TRL: GRPOTrainer with its Dr.GRPO loss; for distillation its DistillationTrainer, or GKDTrainer
(``--variant gkd``). Their loops run here too: callbacks wait for requests before a step and answer them after it."""

import importlib.metadata
import json
import os
import tempfile

import datasets
import torch
import transformers
from serve import Requests, reward, step_arguments
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

options = step_arguments()
torch.set_num_threads(len(os.sched_getaffinity(0)))
prompts = json.loads(options.prompts.read_text())
texts = [" ".join(map(str, prompt)) for prompt in prompts]
rows = len(prompts) * options.group
requests: Requests
tokens = 0


def load(folder) -> transformers.Qwen2ForCausalLM:
    model = transformers.Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    return model


def numbers(vocab_size: int) -> transformers.PreTrainedTokenizerFast:
    """A text is its token ids in decimal. The model has no end token, and prompts of one length need no padding."""
    vocabulary = {str(token): token for token in range(vocab_size)} | {"<end>": vocab_size, "<pad>": vocab_size + 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", padding_side="left"
    )


def even_tokens(completion_ids: list[list[int]], **kwargs: object) -> list[float]:
    rewards = [reward(row) for row in completion_ids]
    requests.sampled()
    return rewards


class Steps(transformers.TrainerCallback):
    """One request, one step."""

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if requests.begin() is None:
            raise SystemExit

    def on_step_end(self, args, state, control, **kwargs) -> None:
        requests.stop()

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "loss" in logs:
            made = round(logs["completions/mean_length"] * rows) if "completions/mean_length" in logs else tokens
            found = {"tokens": made, "loss": logs["loss"], "grad_norm": logs["grad_norm"]}
            requests.answer(requests.measured | found)


class CountingGKDTrainer(GKDTrainer):
    """Counts the tokens that a step learns from."""

    @staticmethod
    def generate_on_policy_outputs(model, inputs, generation_config):
        global tokens
        outputs = GKDTrainer.generate_on_policy_outputs(model, inputs, generation_config)
        requests.sampled()
        tokens = int((outputs[2] != -100).sum())
        return outputs


def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
    """Prompts alone, for GKDTrainer, which replaces the other fields by what it samples. The loss is divided by the
    number of labels here after the first, so there are as many as will be sampled."""
    prompt_BS = torch.tensor([example["ids"] for example in examples])
    replaced = torch.zeros((len(examples), options.new_tokens + 1), dtype=torch.long)
    given = {"input_ids": replaced, "attention_mask": torch.ones_like(replaced), "labels": replaced}
    return given | {"prompts": prompt_BS, "prompt_attention_mask": torch.ones_like(prompt_BS)}


model = load(options.checkpoint)
tokenizer = numbers(model.config.vocab_size)
assert tokenizer(texts)["input_ids"] == prompts
common = {
    "output_dir": tempfile.mkdtemp(),
    "per_device_train_batch_size": rows,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "max_steps": 10**6,
    "learning_rate": 1e-6,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "bf16": False,
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "temperature": 1.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
shared = {"processing_class": tokenizer, "callbacks": [Steps()]}
if options.what == "grpo":
    trainer = GRPOTrainer(
        model,
        reward_funcs=even_tokens,
        args=GRPOConfig(
            **common,
            loss_type="dr_grpo",
            scale_rewards=False,
            beta=0.0,
            num_iterations=1,
            num_generations=options.group,
            steps_per_generation=1,
            max_completion_length=options.new_tokens,
        ),
        train_dataset=datasets.Dataset.from_dict({"prompt": texts}),
        **shared,
    )
elif options.variant == "gkd":
    trainer = CountingGKDTrainer(
        model,
        load(options.teacher),
        args=GKDConfig(**common, lmbda=1.0, beta=1.0, max_new_tokens=options.new_tokens),
        data_collator=collate,
        train_dataset=datasets.Dataset.from_dict({"ids": [prompt for prompt in prompts for _ in range(options.group)]}),
        **shared,
    )
else:
    trainer = DistillationTrainer(
        model,
        load(options.teacher),
        args=DistillationConfig(**common, beta=1.0, max_completion_length=options.new_tokens),
        train_dataset=datasets.Dataset.from_dict({"prompt": [text for text in texts for _ in range(options.group)]}),
        **shared,
    )
requests = Requests(
    {
        "trl": importlib.metadata.version("trl"),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "trainer": type(trainer).__mro__[int(options.variant == "gkd")].__name__,
    }
)
trainer.train()
