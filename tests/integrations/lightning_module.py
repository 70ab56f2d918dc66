"""The module that test_lightning.py trains, in one process and in several."""

import warnings

from integrations.text import ByteModel, pieces_of

# Lightning's own imports warn of what its dependencies deprecated.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lightning.pytorch import Callback, LightningModule, Trainer
import torch

OPTIONS = {
    "accelerator": "cpu",
    "use_distributed_sampler": False,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}

__all__ = ["OPTIONS", "Callback", "Module", "Trainer"]


class Module(LightningModule):
    """A language model that records the pieces it sees; `make` makes the loader where Lightning asks for it."""

    def __init__(self, make=None):
        super().__init__()
        torch.manual_seed(0)
        self.model, self.make, self.loader = ByteModel(), make, None
        self.epochs, self.state, self.last = [], None, None

    def train_dataloader(self):
        """Return the loader at the epoch to come, for `reload_dataloaders_every_n_epochs` too."""
        self.loader = self.loader or self.make()
        self.loader.set_epoch(self.trainer.current_epoch)
        return self.loader

    def on_train_epoch_start(self):
        """Start a record."""
        self.epochs.append([])

    def training_step(self, batch, batch_idx):
        """Return the loss, scaled as DDP needs it."""
        if not self.epochs:  # Lightning does not say so where it resumes inside an epoch
            self.epochs.append([])
        self.epochs[-1].append(pieces_of(batch))
        self.last = batch
        losses, self.state = self.model(batch, self.state)
        self.log("loss", losses / max(batch.loss_tokens, 1), batch_size=batch.loss_tokens)
        return losses * batch.loss_scale

    def configure_optimizers(self):
        """Return plain descent."""
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_save_checkpoint(self, checkpoint):
        """Save what a loop of one's own would save."""
        checkpoint["loader_by_hand"] = self.trainer.train_dataloader.state_dict(after=self.last)
