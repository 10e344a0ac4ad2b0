import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

dataset = load_dataset("trl-lib/tldr", split="train")
evaluation = load_dataset("trl-lib/tldr", split="validation")

args = SFTConfig(
    "tldr-lora",
    learning_rate=2e-4,
    max_steps=2,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    gradient_checkpointing=True,
    max_length=512,
    packing=False,
    padding_free=False,
    dataset_num_proc=None,
    completion_only_loss=True,
    eos_token=None,
    logging_steps=1,
    eval_strategy="steps",
    eval_steps=1,
    report_to="none",
)
trainer = SFTTrainer(
    "Qwen/Qwen2.5-0.5B",
    args,
    None,
    dataset,
    evaluation,
    optimizer_cls_and_kwargs=(torch.optim.AdamW, {"lr": 2e-4}),
    peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model()
