from lightning.pytorch import LightningModule, Trainer
from torch import arange, nn, optim

import seqbatch.rnn


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(128, 32), seqbatch.rnn.LSTM(32, 32), nn.Linear(32, 128)

    def train_dataloader(self):  # here, not before: the processes are known now
        return seqbatch.make_loader([arange(2 + i % 30) for i in range(400)], seqbatch.Padding(16), next_token=True)

    def training_step(self, batch, _):
        scores = self.head(self.rnn(self.embed(batch.data), mask=batch.mask)[0])
        return batch.loss_scale * nn.functional.cross_entropy(scores.mT, batch.targets, reduction="sum")

    def configure_optimizers(self):
        return optim.Adam(self.parameters(), lr=0.01)


Trainer(max_epochs=3, use_distributed_sampler=False).fit(Model())
