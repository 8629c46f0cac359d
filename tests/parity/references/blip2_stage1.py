"""BLIP-2's first stage (Li et al. 2023, Sec. 3.2 and Fig. 2) written out: one pass of queries and text together for
each of the three attention masks of the figure, and the losses position by position. Slow, and with nothing from
`shared`.

Weights are a dictionary under the names of the authors' code; its gradients are those of the losses.
"""

import math

import torch

NORM_EPS = {"ln_vision": 1e-5}  # torch's default; everywhere else BERT's
BERT_EPS = 1e-12


class Reference:
    """tokens: [CLS] words [SEP] padding; features: (pictures, tokens, channels) of the frozen encoder."""

    def __init__(self, weights, *, layers, heads, cross_every, pad, decode):
        self.p, self.layers, self.heads, self.cross_every = weights, layers, heads, cross_every
        self.pad, self.decode = pad, decode

    # ---- the network

    def linear(self, name, x):
        return x @ self.p[f"{name}.weight"].T + self.p[f"{name}.bias"]

    def norm(self, name, x):
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + NORM_EPS.get(name, BERT_EPS)).sqrt()
        return centred / scale * self.p[f"{name}.weight"] + self.p[f"{name}.bias"]

    def attend(self, name, x, seen, allowed):
        """x (n, width), seen (m, its width), allowed (n, m)."""
        q, k, v = (self.linear(f"{name}.{part}", of) for part, of in (("query", x), ("key", seen), ("value", seen)))
        size, mixed = q.shape[1] // self.heads, []
        for head in range(self.heads):
            own = slice(head * size, (head + 1) * size)
            scores = (q[:, own] @ k[:, own].T / math.sqrt(size)).masked_fill(~allowed, -math.inf)
            mixed.append(scores.softmax(1) @ v[:, own])
        return torch.cat(mixed, 1)

    def sublayer(self, name, x, change):
        return self.norm(f"{name}.LayerNorm", x + self.linear(f"{name}.dense", change))

    def gelu(self, x):
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2

    def run(self, picture, tokens, allowed):
        """One picture (tokens, channels) and one text (n,), allowed (queries + n, queries + n): who sees whom ->
        (states of the queries, states of the text)."""
        bert = "Qformer.bert"
        queries = self.p["query_tokens"][0]
        count = len(queries)
        words = self.p[f"{bert}.embeddings.word_embeddings.weight"][tokens]
        words = words + self.p[f"{bert}.embeddings.position_embeddings.weight"][: len(tokens)]
        x = self.norm(f"{bert}.embeddings.LayerNorm", torch.cat([queries, words]))
        context = self.norm("ln_vision", picture)
        everything = torch.ones(count, len(context), dtype=torch.bool)
        for layer in range(self.layers):
            at = f"{bert}.encoder.layer.{layer}"
            x = self.sublayer(f"{at}.attention.output", x, self.attend(f"{at}.attention.self", x, x, allowed))
            looking, text = x[:count], x[count:]
            if layer % self.cross_every == 0:
                seen = self.attend(f"{at}.crossattention.self", looking, context, everything)
                looking = self.sublayer(f"{at}.crossattention.output", looking, seen)
            mlp_width = self.gelu(self.linear(f"{at}.intermediate_query.dense", looking))
            looking = self.sublayer(f"{at}.output_query", looking, mlp_width)
            mlp_width = self.gelu(self.linear(f"{at}.intermediate.dense", text))
            text = self.sublayer(f"{at}.output", text, mlp_width)
            x = torch.cat([looking, text])
        return x[:count], x[count:]

    # ---- the masks of Fig. 2: rows see columns

    def mask(self, kind, tokens):
        count, length = self.p["query_tokens"].shape[1], len(tokens)
        allowed = torch.zeros(count + length, count + length, dtype=torch.bool)
        for row in range(count + length):
            for column in range(count + length):
                queries = row < count, column < count
                if kind == "uni-modal":
                    sees = queries[0] == queries[1]
                elif kind == "bi-directional":
                    sees = True
                else:  # multi-modal causal
                    sees = queries[1] or (not queries[0] and column <= row)
                padding = column >= count and tokens[column - count] == self.pad
                allowed[row, column] = sees and not padding
        return allowed

    # ---- the losses

    def vectors(self, features, tokens):
        """Unit vectors of every query of every picture, and of every text."""
        images, texts = [], []
        for picture, text in zip(features, tokens, strict=True):
            queries, words = self.run(picture, text, self.mask("uni-modal", text))
            images.append(self.unit(self.linear("vision_proj", queries)))
            texts.append(self.unit(self.linear("text_proj", words[0])))
        return torch.stack(images), torch.stack(texts)

    def unit(self, x):
        return x / x.square().sum(-1, keepdim=True).sqrt()

    def contrast(self, images, texts):
        """[picture][text] and [text][picture]: the best query's product over the temperature. What is compared with is
        constant: the authors gather it from all devices without a gradient."""
        count = len(images)
        rows = [
            [torch.stack([query @ texts[other].detach() for query in images[row]]).max() for other in range(count)]
            for row in range(count)
        ]
        columns = [
            [torch.stack([query @ texts[row] for query in images[other].detach()]).max() for other in range(count)]
            for row in range(count)
        ]
        return tuple(torch.stack([torch.stack(row) for row in side]) / self.p["temp"] for side in (rows, columns))

    def itc(self, sides, ids, smoothing):
        """ids: whose picture each is, or None where each pair is on its own."""
        count, total = len(sides[0]), 0.0
        for side in sides:
            for row in range(count):
                same = [float(row == key if ids is None else ids[row] == ids[key]) for key in range(count)]
                wanted = [(1 - smoothing) * one / sum(same) + smoothing / count for one in same]
                logs = side[row] - torch.logsumexp(side[row], 0)
                total = total - sum(share * log for share, log in zip(wanted, logs, strict=True))
        return total / (2 * count)

    def negative_probabilities(self, side, ids):
        """How likely each other one is drawn as a row's hard negative."""
        weights = torch.softmax(side.detach(), 1)
        for row in range(len(weights)):
            for key in range(len(weights)):
                if row == key or (ids is not None and ids[row] == ids[key]):
                    weights[row, key] = 0.0
        return weights / weights.sum(1, keepdim=True)

    def match(self, picture, text):
        """Logits (no, yes): the mean of the queries' votes."""
        queries, _ = self.run(picture, text, self.mask("bi-directional", text))
        return torch.stack([self.linear("itm_head", query) for query in queries]).mean(0)

    def itm(self, features, tokens, images, texts):
        """images[t]: a false picture for text t; texts[i]: a false text for picture i."""
        count = len(tokens)
        pairs = [(row, row, 1) for row in range(count)]
        pairs += [(images[row], row, 0) for row in range(count)] + [(row, texts[row], 0) for row in range(count)]
        total = 0.0
        for picture, text, right in pairs:
            logits = self.match(features[picture], tokens[text])
            total = total + torch.logsumexp(logits, 0) - logits[right]
        return total / len(pairs)

    def itg(self, features, tokens, smoothing):
        head, table = "Qformer.cls.predictions", self.p["Qformer.bert.embeddings.word_embeddings.weight"]
        total, count = 0.0, 0
        for picture, text in zip(features, tokens, strict=True):
            said = torch.cat([torch.tensor([self.decode]), text[1:]])
            _, states = self.run(picture, said, self.mask("multi-modal causal", said))
            for position in range(len(said) - 1):
                wanted = int(said[position + 1])
                if wanted == self.pad:
                    continue
                x = self.gelu(self.linear(f"{head}.transform.dense", states[position]))
                logits = self.norm(f"{head}.transform.LayerNorm", x) @ table.T + self.p[f"{head}.bias"]
                logs = logits - torch.logsumexp(logits, 0)
                total = total - (1 - smoothing) * logs[wanted] - smoothing * logs.mean()
                count += 1
        return total / count
