"""Compares gptjax with other implementations of GPT-1, on the CPU of this machine.

python benchmarks/train_step.py --size=gpt1|tutorial
python benchmarks/finetune.py --train_file=FILE --size=gpt1|tutorial
python benchmarks/generate.py --size=gpt1 --batch=1,16 --tokens=128
python benchmarks/predict.py --input=FILE

Each program writes a Markdown table, JSON with every measurement, and a plot to the folder
--output. In the names of variants, "ours" means gptjax.
"""
