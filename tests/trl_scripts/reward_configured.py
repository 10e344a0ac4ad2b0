from datasets import load_dataset
from peft import LoraConfig
from trl import RewardConfig, RewardTrainer

dataset = load_dataset("trl-lib/ultrafeedback_binarized", split="train")

args = RewardConfig(
    output_dir="reward",
    center_rewards_coefficient=0.01,
    max_length=2048,
    max_steps=2,
    per_device_train_batch_size=4,
    logging_steps=1,
    eval_strategy="steps",
    eval_steps=1,
    report_to="none",
)
trainer = RewardTrainer(
    model="Qwen/Qwen2.5-0.5B-Instruct",
    args=args,
    train_dataset=dataset,
    eval_dataset=dataset,
    peft_config=LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear", modules_to_save=["score"]),
)
trainer.train()
trainer.save_model()
