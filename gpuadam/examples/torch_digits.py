"""Train a PyTorch model, with one line changed.

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)      becomes
    optimizer = gpuadam.torch.AdamW(model.parameters(), lr=2e-3)

Both train the same model from the same parameters on the same batches of scikit-learn's handwritten digits.
"""

from typing import Any

from . import command_line
from .digits import load_digits


def main(argv: list[str] | None = None) -> None:
    """Train twice and print how many of the images held out each reads rightly."""
    counts = {"steps": (20, "passes over the images"), "size": (128, "units of the hidden layer")}
    options = command_line.options(argv, __doc__, **counts, device=("cpu", "a torch device, such as cuda"))
    torch, drop_in = command_line.need("torch", "torch", "gpuadam.torch")
    (x, y), (x_test, y_test) = [
        (torch.tensor(x, dtype=torch.float32, device=options.device), torch.tensor(y, device=options.device))
        for x, y in load_digits()
    ]
    for name, AdamW in (("torch.optim.AdamW", torch.optim.AdamW), ("gpuadam.torch.AdamW", drop_in.AdamW)):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(64, options.size), torch.nn.ReLU(), torch.nn.Linear(options.size, 10)
        ).to(options.device)
        optimizer = AdamW(model.parameters(), lr=2e-3)  # the one line
        loss = train(torch, model, optimizer, x, y, options.steps)
        with torch.no_grad():
            right = (model(x_test).argmax(dim=1) == y_test).float().mean().item()
        print(f"{name:20} loss {loss:.4f}, {right:.2%} of {len(y_test)} digits held out are read rightly")


def train(torch: Any, model: Any, optimizer: Any, x: Any, y: Any, passes: int, batch: int = 64) -> Any:
    """Train as ever: zero the gradients, loss, backward, step. Return the mean loss of the last pass."""
    order = torch.Generator().manual_seed(0)
    losses: list[Any] = []
    for _ in command_line.steps(passes, lambda: f"loss {torch.stack(losses).mean().item():.4f}"):
        losses.clear()
        for chosen in torch.randperm(len(x), generator=order).to(x.device).split(batch):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x[chosen]), y[chosen])
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return torch.stack(losses).mean().item()


if __name__ == "__main__":
    command_line.run(main)
