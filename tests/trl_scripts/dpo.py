from datasets import load_dataset
from trl import DPOTrainer

dataset = load_dataset("trl-lib/ultrafeedback_binarized", split="train")

trainer = DPOTrainer(model="Qwen/Qwen3-0.6B", train_dataset=dataset)
trainer.train()
