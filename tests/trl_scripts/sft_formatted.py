from datasets import load_dataset
from trl import SFTConfig, SFTTrainer


def as_text(row):
    return f"Question: {row['question']}\nAnswer: {row['answer']}"


trainer = SFTTrainer(
    model="Qwen/Qwen2.5-0.5B",
    args=SFTConfig(output_dir="gsm8k", max_steps=2, per_device_train_batch_size=4, report_to="none"),
    train_dataset=load_dataset("openai/gsm8k", "main", split="train"),
    formatting_func=as_text,
)
trainer.train()
