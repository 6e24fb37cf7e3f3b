"""Recurrent models of OpenNMT-py, fairseq and JoeyNMT, in plain torch, for one sentence: modules that have the tensor
names of each library, and a forward pass by its rules. Sizes differ everywhere, so that a mix-up shows.
"""

import argparse
import math

import torch
import torch.nn.functional as F
from torch import nn

SOURCES, TARGETS = 11, 12  # tokens
E, F_ = 5, 6  # embedding sizes of source and target


class Box(nn.Module):
    """A module of modules, by name."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            if module is not None:
                setattr(self, name, module)


def large(module, scale=0.6):
    """The module with random weights that make large gates and flat attention impossible."""
    generator = torch.Generator().manual_seed(0)
    for p in module.parameters():
        p.data = scale * torch.randn(p.shape, generator=generator)
    return module.eval()


def both_directions(state):
    """(layers * 2, H) -> (layers, 2H)."""
    return torch.cat((state[0::2], state[1::2]), -1)


def attend(scores, memory):
    return scores.softmax(-1) @ memory


class OpenNMT(nn.Module):
    """RNNEncoder, StdRNNDecoder or InputFeedRNNDecoder, GlobalAttention; ``brnn`` halves the hidden size."""

    def __init__(self, attention="general", layers=1, brnn=True, input_feed=1, bridge=False, hidden=8):
        super().__init__()
        self.kind, self.layers, self.brnn, self.input_feed, self.use_bridge = (
            attention,
            layers,
            brnn,
            input_feed,
            bridge,
        )
        directions = 2 if brnn else 1
        self.encoder = Box(
            embeddings=self.embeddings(SOURCES, E),
            rnn=nn.LSTM(E, hidden // directions, layers, bidirectional=brnn),
            bridge=nn.ModuleList(nn.Linear(*[hidden // directions * layers] * 2) for _ in "hc") if bridge else None,
        )
        if input_feed:
            cells = [nn.LSTMCell(F_ + hidden if k == 0 else hidden, hidden) for k in range(layers)]
            rnn = Box(layers=nn.ModuleList(cells))
        else:
            rnn = nn.LSTM(F_, hidden, layers)
        mlp = attention == "mlp"
        attn = Box(
            linear_in=nn.Linear(hidden, hidden, bias=False) if attention == "general" else None,
            linear_context=nn.Linear(hidden, hidden, bias=False) if mlp else None,
            linear_query=nn.Linear(hidden, hidden) if mlp else None,
            v=nn.Linear(hidden, 1, bias=False) if mlp else None,
            linear_out=nn.Linear(2 * hidden, hidden, bias=mlp),
        )
        self.decoder = Box(embeddings=self.embeddings(TARGETS, F_), rnn=rnn, attn=attn)
        self.generator = nn.Linear(hidden, TARGETS)

    @staticmethod
    def embeddings(tokens, size):
        return Box(make_embedding=Box(emb_luts=nn.ModuleList([nn.Embedding(tokens, size)])))

    def embed(self, side, tokens):
        return side.embeddings.make_embedding.emb_luts[0](tokens)

    def combined(self, query, memory):
        attn = self.decoder.attn
        if self.kind == "mlp":
            scores = attn.v((attn.linear_query(query) + attn.linear_context(memory)).tanh())[:, 0]
        else:
            scores = memory @ (attn.linear_in(query) if self.kind == "general" else query)
        vector = attn.linear_out(torch.cat((attend(scores, memory), query)))
        return vector if self.kind == "mlp" else vector.tanh()

    def forward(self, source, target):
        memory, (h, c) = self.encoder.rnn(self.embed(self.encoder, source))
        if self.use_bridge:
            size = self.encoder.bridge[0].in_features
            h, c = (f(s.reshape(-1, size)).relu().view_as(s) for f, s in zip(self.encoder.bridge, (h, c), strict=True))
        if self.brnn:
            h, c = both_directions(h), both_directions(c)
        embedded = self.embed(self.decoder, target)
        if not self.input_feed:
            vectors = [self.combined(q, memory) for q in self.decoder.rnn(embedded, (h, c))[0]]
        else:
            vectors, h, c = [], list(h), list(c)
            feed = torch.zeros_like(h[0])
            for x in embedded:
                x = torch.cat((x, feed))
                for k, cell in enumerate(self.decoder.rnn.layers):
                    h[k], c[k] = cell(x, (h[k], c[k]))
                    x = h[k]
                feed = self.combined(x, memory)
                vectors.append(feed)
        return self.generator(torch.stack(vectors))

    def checkpoint(self, **options):
        """The dictionary that OpenNMT-py 3 saves."""
        state = self.state_dict()
        specials = ["<unk>", "<blank>", "<s>", "</s>"]
        opt = dict(
            model_type="text",
            encoder_type="brnn" if self.brnn else "rnn",
            decoder_type="rnn",
            rnn_type="LSTM",
            enc_layers=self.layers,
            dec_layers=self.layers,
            input_feed=self.input_feed,
            bridge=self.use_bridge,
            global_attention=self.kind,
            dropout=[0.3],
        )
        return {
            "model": {name: t for name, t in state.items() if not name.startswith("generator.")},
            "generator": self.generator.state_dict(),
            "vocab": {
                "src": specials + list("abcdefg"),
                "tgt": specials + list("stuvwxyz"),
                "decoder_start_token": "<s>",
                "data_task": "seq2seq",
            },
            "opt": argparse.Namespace(**(opt | options)),
        }


class Fairseq(nn.Module):
    """LSTMModel: general attention, input feeding, and projections where sizes differ."""

    def __init__(self, layers=1, bidirectional=True, narrow=3, units=4, out=None, shared=False, shared_all=False):
        super().__init__()
        directions, out = 2 if bidirectional else 1, units if out is None else out
        width, size = directions * narrow, out if shared or shared_all else F_
        self.layers, self.bidirectional, self.shared, self.shared_all = layers, bidirectional, shared, shared_all
        tokens = TARGETS if shared_all else SOURCES
        self.encoder = Box(
            embed_tokens=nn.Embedding(tokens, size if shared_all else E),
            lstm=nn.LSTM(size if shared_all else E, narrow, layers, bidirectional=bidirectional),
        )
        bridged = width != units
        self.decoder = Box(
            embed_tokens=self.encoder.embed_tokens if shared_all else nn.Embedding(TARGETS, size),
            encoder_hidden_proj=nn.Linear(width, units) if bridged else None,
            encoder_cell_proj=nn.Linear(width, units) if bridged else None,
            layers=nn.ModuleList(nn.LSTMCell(size + units if k == 0 else units, units) for k in range(layers)),
            attention=Box(
                input_proj=nn.Linear(units, width, bias=False), output_proj=nn.Linear(units + width, units, bias=False)
            ),
            additional_fc=nn.Linear(units, out) if out != units else None,
            fc_out=None if shared or shared_all else nn.Linear(out, TARGETS),
        )

    def forward(self, source, target):
        d = self.decoder
        memory, (h, c) = self.encoder.lstm(self.encoder.embed_tokens(source))
        if self.bidirectional:
            h, c = both_directions(h), both_directions(c)
        if hasattr(d, "encoder_hidden_proj"):
            h, c = d.encoder_hidden_proj(h), d.encoder_cell_proj(c)
        h, c, feed, logits = list(h), list(c), torch.zeros_like(h[0]), []
        for x in d.embed_tokens(target):
            x = torch.cat((x, feed))
            for k, cell in enumerate(d.layers):
                h[k], c[k] = cell(x, (h[k], c[k]))
                x = h[k]
            context = attend((memory * d.attention.input_proj(x)).sum(1), memory)
            feed = d.attention.output_proj(torch.cat((context, x))).tanh()
            vector = d.additional_fc(feed) if hasattr(d, "additional_fc") else feed
            logits.append(d.fc_out(vector) if hasattr(d, "fc_out") else F.linear(vector, d.embed_tokens.weight))
        return torch.stack(logits)

    def checkpoint(self, new=True, **options):
        """The dictionary of a checkpoint: with ``new`` options in cfg, else in args."""
        args = argparse.Namespace(
            **dict(
                arch="lstm",
                dropout=0.1,
                encoder_layers=self.layers,
                decoder_layers=self.layers,
                encoder_bidirectional=self.bidirectional,
                decoder_attention="1",
                share_decoder_input_output_embed=self.shared,
                share_all_embeddings=self.shared_all,
                source_lang="de",
                target_lang="en",
                lr=[0.001],
            )
            | options
        )
        state = {"model": self.state_dict(), "extra_state": {"epoch": 3}}
        task = {"_name": "translation", "source_lang": "de", "target_lang": "en"}
        return state | ({"args": None, "cfg": {"model": args, "task": task}} if new else {"args": args})


class Joey(nn.Module):
    """RecurrentEncoder and RecurrentDecoder: h and c start alike, W [query, context] + b."""

    def __init__(
        self, attention="bahdanau", below=1, above=1, start="bridge", feed=True, narrow=3, units=4, scale=False
    ):
        super().__init__()
        self.kind, self.start, self.feed, self.scale, self.below, self.above = (
            attention,
            start,
            feed,
            scale,
            below,
            above,
        )
        self.units, width = units, 2 * narrow
        self.src_embed, self.trg_embed = (Box(lut=nn.Embedding(*sizes)) for sizes in ((SOURCES, E), (TARGETS, F_)))
        self.encoder = Box(rnn=nn.LSTM(E, narrow, below, bidirectional=True))
        additive = attention == "bahdanau"
        self.decoder = Box(
            rnn=nn.LSTM(F_ + (units if feed else 0), units, above),
            att_vector_layer=nn.Linear(units + width, units),
            output_layer=nn.Linear(units, TARGETS, bias=False),
            attention=Box(
                key_layer=nn.Linear(width, units, bias=False),
                query_layer=nn.Linear(units, units, bias=False) if additive else None,
                energy_layer=nn.Linear(units, 1, bias=False) if additive else None,
            ),
            bridge_layer=nn.Linear(width, units) if start == "bridge" else None,
        )

    def forward(self, source, target):
        d, factors = self.decoder, [math.sqrt(n) if self.scale else 1.0 for n in (E, F_)]
        memory, (h, _) = self.encoder.rnn(self.src_embed.lut(source) * factors[0])
        final = torch.cat((h[-2], h[-1]))
        first = {
            "bridge": lambda: d.bridge_layer(final).tanh(),
            "last": lambda: final[: self.units],
            "zero": lambda: torch.zeros(self.units),
        }[self.start]()
        state = (first.repeat(self.above, 1),) * 2
        feed, logits = torch.zeros(self.units), []
        for x in self.trg_embed.lut(target) * factors[1]:
            x = torch.cat((x, feed)) if self.feed else x
            state = d.rnn(x[None], state)[1]
            query, keys = state[0][-1], d.attention.key_layer(memory)
            if self.kind == "bahdanau":
                scores = d.attention.energy_layer((d.attention.query_layer(query) + keys).tanh())[:, 0]
            else:
                scores = keys @ query
            feed = d.att_vector_layer(torch.cat((query, attend(scores, memory)))).tanh()
            logits.append(d.output_layer(feed))
        return torch.stack(logits)

    def config(self, **model):
        """config.yaml as a dictionary."""
        embeddings = {"embedding_dim": E, "scale": self.scale}
        encoder = dict(type="recurrent", rnn_type="lstm", embeddings=embeddings, hidden_size=3, bidirectional=True)
        decoder = dict(
            type="recurrent",
            rnn_type="lstm",
            embeddings={"embedding_dim": F_, "scale": self.scale},
            hidden_size=self.units,
            num_layers=self.above,
            attention=self.kind,
            init_hidden=self.start,
            input_feeding=self.feed,
        )
        encoder |= {"num_layers": self.below, "dropout": 0.2}
        return {"name": "toy", "data": {}, "model": {"encoder": encoder, "decoder": decoder} | model}

    def checkpoint(self):
        return {"steps": 5, "model_state": self.state_dict(), "optimizer_state": {}}
