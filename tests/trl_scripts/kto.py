from datasets import load_dataset
from trl import KTOTrainer

dataset = load_dataset("trl-lib/kto-mix-14k", split="train")

trainer = KTOTrainer(model="Qwen/Qwen3-0.6B", train_dataset=dataset)
trainer.train()
