import transformers

import seqbatch


class Trainer(transformers.Trainer):
    def get_train_dataloader(self):
        strategy = seqbatch.Packing(256, rows=4)
        return seqbatch.make_loader(self.train_dataset, strategy, as_dict=True, layout="batch_first")


data = seqbatch.TokenArray.of_sequences([list(f"{i} squared is {i * i}".encode()) for i in range(400)])
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=128, **sizes))
settings = transformers.TrainingArguments(num_train_epochs=3, learning_rate=0.01, report_to="none", logging_steps=1)
trainer = Trainer(model, settings, train_dataset=data)
trainer.train()
