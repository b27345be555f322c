"""Put a trait on the dial, with a loop of your own: plain functions in, a trained adapter out. Offline, under a minute on one core.

    python examples/steer.py

On a model of your own: AutoModelForCausalLM.from_pretrained(...), ContrastivePairs.from_jsonl("pairs.jsonl"), and encode(tokenizer).
"""

import torch
import two_styles
from tqdm import tqdm

import lora_lite as ll

STEPS, POLES = 60, (1.0, -1.0)

torch.manual_seed(0)
model = two_styles.tiny_llama()
train, held = two_styles.contrast().split(0.1)
adapter = ll.attach(model, ll.LoRAConfig(r=4, alpha=8), seed=0)  # the base is frozen now, and stays as it is
optimizer = torch.optim.AdamW(adapter.parameters(), lr=3e-3, weight_decay=0.0)


def pole_losses(rows):
    """What one adapter should do at both poles, for rows that hold the chosen texts and then the rejected ones."""
    with torch.no_grad(), adapter(model, c=0):  # c = 0 is the base, bit for bit: no second model for the reference
        reference = model(**rows.inputs()).logits
    chosen_before, rejected_before = ll.completion_nll(reference, rows.ids, rows.completion).chunk(2)

    both = rows.repeat(2)
    with adapter(model, c=torch.tensor(POLES).repeat_interleave(len(rows.ids))):  # both poles in one forward, a c per row
        up, down = model(**both.inputs()).logits.chunk(2)
    chosen_up, rejected_up = ll.completion_nll(up, rows.ids, rows.completion).chunk(2)
    chosen_down, rejected_down = ll.completion_nll(down, rows.ids, rows.completion).chunk(2)

    kl_up, kl_down = (ll.reference_kl(logits, reference, rows.completion) for logits in (up, down))
    loss_up = ll.margin_nll(chosen_up, rejected_up, chosen_before, rejected_before, cap=3.0) + 10.0 * kl_up
    loss_down = ll.margin_nll(rejected_down, chosen_down, rejected_before, chosen_before, cap=3.0) + 10.0 * kl_down
    return loss_up, loss_down


for batch in tqdm(train.batches(8, STEPS), total=STEPS):
    optimizer.zero_grad()
    ll.pcgrad(pole_losses(batch.encode()), adapter.parameters())  # or sum(pole_losses(...)).backward()
    optimizer.step()

with torch.no_grad():
    print("held-out loss at c = +1, -1:", *(f"{loss.item():.2f}" for loss in pole_losses(held.encode())))
torch.manual_seed(1)
for c in (-1.0, -0.5, 0.0, 0.5, 1.0):
    with adapter(model, c=c):
        style, _, valid = two_styles.measured(model)
        said = model.generate(torch.tensor([[0]]), do_sample=True, max_new_tokens=10)[0, 1:].tolist()
    print(f"c = {c:4.1f}: log-odds of formal {style:5.2f}, valid {valid:.3f}: {' '.join(two_styles.VOCABULARY[i] for i in said)}")
