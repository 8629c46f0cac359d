"""ALBEF written a second time, straight from the equations, over tensors with the names of the official checkpoints.

Slow, with loops, in plain torch; nothing of this repository is imported. Li et al. 2021, Sec. 3 and 5.
"""

import math

import torch


def linear(p, name, x):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def norm(p, name, x, eps):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (variance + eps) ** 0.5 * p[f"{name}.weight"] + p[f"{name}.bias"]


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def unit(x):
    return x / (x**2).sum(-1, keepdim=True) ** 0.5


def attend(q, k, v, heads, allowed=None, keep=None):
    """q (B, T, D), k, v (B, S, D), allowed (B, T, S). Head by head; keep: a list that takes the weights."""
    parts, size = [], q.shape[-1] // heads
    for head in range(heads):
        columns = slice(head * size, (head + 1) * size)
        scores = q[..., columns] @ k[..., columns].transpose(1, 2) / size**0.5
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -1e30)
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        weights = weights / weights.sum(-1, keepdim=True)
        if keep is not None:
            keep.append(weights)
        parts.append(weights @ v[..., columns])
    return torch.cat(parts, -1)


def see(p, name, pictures, heads):
    """Normalised pictures (B, 3, S, S) -> all tokens (B, 1 + N, D)."""
    kernel = p[f"{name}.patch_embed.proj.weight"]
    patch, size = kernel.shape[-1], pictures.shape[-1]
    tokens = [p[f"{name}.cls_token"][0].expand(len(pictures), 1, -1)]
    for top in range(0, size, patch):
        for left in range(0, size, patch):
            piece = pictures[:, :, top : top + patch, left : left + patch].reshape(len(pictures), -1)
            one = piece @ kernel.reshape(len(kernel), -1).T + p[f"{name}.patch_embed.proj.bias"]
            tokens.append(one[:, None])
    x = torch.cat(tokens, 1) + p[f"{name}.pos_embed"]
    layer = 0
    while f"{name}.blocks.{layer}.norm1.weight" in p:
        place = f"{name}.blocks.{layer}"
        q, k, v = linear(p, f"{place}.attn.qkv", norm(p, f"{place}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(p, f"{place}.attn.proj", attend(q, k, v, heads))
        x = x + linear(p, f"{place}.mlp.fc2", gelu(linear(p, f"{place}.mlp.fc1", norm(p, f"{place}.norm2", x, 1e-6))))
        layer += 1
    return norm(p, f"{name}.norm", x, 1e-6)


def embed(p, name, tokens):
    x = p[f"{name}.word_embeddings.weight"][tokens] + p[f"{name}.position_embeddings.weight"][: tokens.shape[1]]
    return norm(p, f"{name}.LayerNorm", x + p[f"{name}.token_type_embeddings.weight"][0], 1e-12)


def look(p, place, x, context, heads, allowed, keep=None):
    """One attention of BERT with its residual and norm."""
    q, k, v = linear(p, f"{place}.self.query", x), *(linear(p, f"{place}.self.{n}", context) for n in ("key", "value"))
    out = linear(p, f"{place}.output.dense", attend(q, k, v, heads, allowed, keep))
    return norm(p, f"{place}.output.LayerNorm", x + out, 1e-12)


def layers(p, name, x, attention_mask, which, heads, pictures=None, seen=None, causal=False, keep=None):
    """Layers `which` of a BERT; pictures: the context, or a list of contexts that the layers take in turn; seen (B, S):
    which of its positions count; keep {layer: list} takes the cross-attention weights."""
    length = x.shape[1]
    allowed = attention_mask[:, None, :].expand(-1, length, -1)
    if causal:
        allowed = allowed & torch.ones(length, length, dtype=torch.bool).tril()
    for turn, layer in enumerate(which):
        place = f"{name}.encoder.layer.{layer}"
        x = look(p, f"{place}.attention", x, x, heads, allowed)
        if f"{place}.crossattention.self.query.weight" in p and pictures is not None:
            context = pictures[turn % len(pictures)] if isinstance(pictures, list) else pictures
            there = None if seen is None else seen[:, None, :].expand(-1, length, -1)
            x = look(p, f"{place}.crossattention", x, context, heads, there, None if keep is None else keep.get(layer))
        middle = gelu(linear(p, f"{place}.intermediate.dense", x))
        x = norm(p, f"{place}.output.LayerNorm", x + linear(p, f"{place}.output.dense", middle), 1e-12)
    return x


def spell(p, name, x):
    """The word head: logits over the vocabulary."""
    x = norm(p, f"{name}.transform.LayerNorm", gelu(linear(p, f"{name}.transform.dense", x)), 1e-12)
    return x @ p[f"{name}.decoder.weight"].T + p[f"{name}.bias"]


def cross_entropy(logits, label):
    return torch.logsumexp(logits, 0) - logits[label]


class Albef:
    """p: published names -> tensors. sizes: vision_heads, text_heads, text and fusion layers, momentum, pad."""

    def __init__(self, p, sizes):
        self.p, self.sizes = p, sizes
        self.bert = "bert." if any(".bert.embeddings" in key and "text_encoder." in key for key in p) else ""

    def see(self, pictures, m=""):
        return see(self.p, f"visual_encoder{m}", pictures, self.sizes["vision_heads"])

    def text_bert(self, m=""):
        return f"text_encoder{m}.{self.bert}".rstrip(".")

    def run(self, x, attention_mask, which, m="", **more):
        return layers(self.p, self.text_bert(m), x, attention_mask, which, self.sizes["text_heads"], **more)

    def read(self, tokens, m="", attention_mask=None):
        x = embed(self.p, f"{self.text_bert(m)}.embeddings", tokens)
        attention_mask = tokens != self.sizes["pad"] if attention_mask is None else attention_mask
        return self.run(x, attention_mask, range(self.sizes["text"]), m)

    def fuse(self, x, attention_mask, pictures, m="", **more):
        first = self.sizes["text"]
        times = len(pictures) if isinstance(pictures, list) else 1
        which = range(first, first + times * self.sizes["fusion"])
        return self.run(x, attention_mask, which, m, pictures=pictures, **more)

    def move_momentum(self):
        """Eq. before 1: every tensor that has a momentum copy."""
        beta = self.sizes["momentum"]
        for key in self.p:
            head, _, rest = key.partition(".")
            copy = f"{head}_m.{rest}"
            if copy in self.p and self.p[key].is_floating_point():
                # one tensor may stand under two names: give all of them a new one from the old
                self.p[copy] = beta * self.p[copy].detach() + (1 - beta) * self.p[key].detach()

    def features(self, pictures, tokens, m=""):
        seen, read = self.see(pictures, m), self.read(tokens, m)
        image = unit(linear(self.p, f"vision_proj{m}", seen[:, 0]))
        return seen, read, image, unit(linear(self.p, f"text_proj{m}", read[:, 0]))

    def contrast(self, image, text, image_m, text_m, belongs, alpha):
        """ITC, one query after the other; belongs (B, M): the hard targets. -> loss, similarities to this batch."""
        p, temperature, size = self.p, self.p["temp"], len(image)
        text_keys = torch.cat([text_m, p["text_queue"].T])
        image_keys = torch.cat([image_m, p["image_queue"].T])
        total, both = 0.0, []
        for queries, queries_m, keys in ((image, image_m, text_keys), (text, text_m, image_keys)):
            rows = []
            for row in range(size):
                similar = keys @ queries[row] / temperature
                with torch.no_grad():
                    taught = torch.softmax(keys @ queries_m[row] / temperature, 0)
                    target = (1 - alpha) * belongs[row] + alpha * taught
                total = total - (target * torch.log_softmax(similar, 0)).sum() / size / 2
                rows.append(similar[:size])
            both.append(torch.stack(rows))
        return total, both

    def enqueue(self, image_m, text_m, ids=None):
        p, start = self.p, int(self.p["queue_ptr"])
        length = p["image_queue"].shape[1]
        for place in range(len(image_m)):
            column = (start + place) % length
            p["image_queue"][:, column], p["text_queue"][:, column] = image_m[place], text_m[place]
            if ids is not None:
                p["idx_queue"][0, column] = ids[place]
        p["queue_ptr"] = torch.tensor([(start + len(image_m)) % length])

    def matching(self, read, attention_mask, seen, wrong_images, wrong_texts):
        """ITM: true pairs, then every text with its wrong picture, then every picture with its wrong text."""
        pairs = [(i, i, 1) for i in range(len(seen))]
        pairs += [(int(wrong_images[i]), i, 0) for i in range(len(seen))]
        pairs += [(i, int(wrong_texts[i]), 0) for i in range(len(seen))]
        total, logits = 0.0, []
        for image, text, label in pairs:
            fused = self.fuse(read[text : text + 1], attention_mask[text : text + 1], seen[image : image + 1])
            logits.append(linear(self.p, "itm_head", fused[0, 0]))
            total = total + cross_entropy(logits[-1], label) / len(pairs)
        return total, torch.stack(logits)

    def pretrain(self, pictures, tokens, alpha, wrong_images, wrong_texts, masked, labels):
        """One step's losses (itc, itm, mlm); the draws are given. Moves the momentum copy and the queue on."""
        attention_mask = tokens != self.sizes["pad"]
        seen, read, image, text = self.features(pictures, tokens)
        with torch.no_grad():
            self.move_momentum()
            seen_m, _, image_m, text_m = self.features(pictures, tokens, "_m")
        belongs = torch.zeros(len(image), len(image) + self.p["image_queue"].shape[1])
        for row in range(len(image)):
            belongs[row, row] = 1
        itc, self.batch_similarities = self.contrast(image, text, image_m, text_m, belongs, alpha)
        self.enqueue(image_m, text_m)
        itm, self.itm_logits = self.matching(read, attention_mask, seen, wrong_images, wrong_texts)

        read = self.read(masked, attention_mask=attention_mask)
        words = spell(self.p, "text_encoder.cls.predictions", self.fuse(read, attention_mask, seen))
        with torch.no_grad():
            fused_m = self.fuse(self.read(masked, "_m", attention_mask), attention_mask, seen_m, "_m")
            taught = torch.softmax(spell(self.p, "text_encoder_m.cls.predictions", fused_m), -1)
        places = [(row, t) for row in range(len(labels)) for t in range(labels.shape[1]) if labels[row, t] != -100]
        mlm = 0.0
        for row, t in places:
            hard = cross_entropy(words[row, t], labels[row, t])
            soft = -(taught[row, t] * torch.log_softmax(words[row, t], 0)).sum()
            mlm = mlm + ((1 - alpha) * hard + alpha * soft) / len(places)
        return itc, itm, mlm

    def retrieve(self, pictures, tokens, ids, alpha, wrong_images, wrong_texts):
        """Retrieval fine-tuning: (itc, itm)."""
        attention_mask = tokens != self.sizes["pad"]
        seen, read, image, text = self.features(pictures, tokens)
        with torch.no_grad():
            self.move_momentum()
            _, _, image_m, text_m = self.features(pictures, tokens, "_m")
        every = ids.tolist() + self.p["idx_queue"][0].tolist()
        belongs = torch.tensor([[float(one == other) for other in every] for one in ids.tolist()])
        belongs = belongs / belongs.sum(1, keepdim=True)
        itc, self.batch_similarities = self.contrast(image, text, image_m, text_m, belongs, alpha)
        self.enqueue(image_m, text_m, ids)
        itm, self.itm_logits = self.matching(read, attention_mask, seen, wrong_images, wrong_texts)
        return itc, itm

    # ---- heads on the fused [CLS]

    def classify(self, pictures, tokens, m=""):
        """pictures (B, 3, S, S), or (B, 2, 3, S, S): entailment or NLVR2 logits."""
        seen = self.see(pictures, m) if pictures.ndim == 4 else [self.see(pictures[:, i], m) for i in (0, 1)]
        cls = self.fuse(self.read(tokens, m), tokens != self.sizes["pad"], seen, m)[:, 0]
        return linear(self.p, f"cls_head{m}.2", linear(self.p, f"cls_head{m}.0", cls).clamp_min(0))

    def classification(self, pictures, tokens, labels, alpha):
        logits = self.classify(pictures, tokens)
        with torch.no_grad():
            self.move_momentum()
            taught = torch.softmax(self.classify(pictures, tokens, "_m"), 1)
        total = 0.0
        for row in range(len(labels)):
            soft = -(taught[row] * torch.log_softmax(logits[row], 0)).sum()
            total = total + ((1 - alpha) * cross_entropy(logits[row], labels[row]) + alpha * soft) / len(labels)
        return total, logits

    def assign(self, pictures, tokens, rows, labels):
        """Text assignment: each text sees the two pictures `rows` (B, 2)."""
        seen = self.see(pictures)
        fused = self.fuse(self.read(tokens), tokens != self.sizes["pad"], [seen[rows[:, 0]], seen[rows[:, 1]]])
        logits = linear(self.p, "ta_head", fused[:, 0])
        return sum(cross_entropy(logits[row], labels[row]) for row in range(len(labels))) / len(labels)

    # ---- answers

    def answer_logits(self, states, attention_mask, answer, m=""):
        """states (1, T, D) of one question, answer (L,) -> (L, V)."""
        name, answer = f"text_decoder{m}.bert", answer[None]
        x = embed(self.p, f"{name}.embeddings", answer)
        which, there = range(self.sizes["fusion"]), answer != self.sizes["pad"]
        x = layers(
            self.p, name, x, there, which, self.sizes["text_heads"], pictures=states, seen=attention_mask, causal=True
        )  # fmt: skip
        return spell(self.p, f"text_decoder{m}.cls.predictions", x)[0]

    def ask(self, pictures, questions, m=""):
        return self.fuse(self.read(questions, m), questions != self.sizes["pad"], self.see(pictures, m), m)

    def likelihood(self, logits, answer, taught=None, alpha=0.0):
        """Minus the log-likelihood of an answer, word after word, or its distilled mix."""
        total = 0.0
        for place in range(len(answer) - 1):
            word = answer[place + 1]
            if word == self.sizes["pad"]:
                break
            one = cross_entropy(logits[place], word)
            if taught is not None:
                soft = -(torch.softmax(taught[place], 0) * torch.log_softmax(logits[place], 0)).sum()
                one = (1 - alpha) * one + alpha * soft
            total = total + one
        return total

    def vqa(self, pictures, questions, answers, weights, owner, alpha):
        attention_mask = questions != self.sizes["pad"]
        states = self.ask(pictures, questions)
        with torch.no_grad():
            self.move_momentum()
            states_m = self.ask(pictures, questions, "_m")
        total = 0.0
        for answer, weight, row in zip(answers, weights, owner.tolist(), strict=True):
            its = slice(row, row + 1)
            logits = self.answer_logits(states[its], attention_mask[its], answer)
            with torch.no_grad():
                taught = self.answer_logits(states_m[its], attention_mask[its], answer, "_m")
            total = total + weight * self.likelihood(logits, answer, taught, alpha)
        return total / len(pictures)

    def rank(self, picture, question, candidates, keep):
        """One question -> [(candidate, score)], best first; scores before the softmax."""
        states, attention_mask = self.ask(picture[None], question[None]), question[None] != self.sizes["pad"]
        begin = torch.log_softmax(self.answer_logits(states, attention_mask, candidates[0, :1])[0], 0)
        firsts = [(begin[candidate[1]].item(), index) for index, candidate in enumerate(candidates)]
        kept = sorted(firsts, key=lambda pair: -pair[0])[:keep]
        scored = []
        for first, index in kept:
            logits = self.answer_logits(states, attention_mask, candidates[index])
            scored.append((index, first - self.likelihood(logits, candidates[index]).item()))
        return sorted(scored, key=lambda pair: -pair[1])

    # ---- grounding

    def word_maps(self, pictures, tokens, layer):
        """(B, T, rows, columns), of multimodal layer `layer` counted from 0."""
        keep: dict = {self.sizes["text"] + layer: []}
        attention_mask = tokens != self.sizes["pad"]
        fused = self.fuse(self.read(tokens), attention_mask, self.see(pictures), keep=keep)
        score = linear(self.p, "itm_head", fused[:, 0])[:, 1].sum()
        weights = keep[self.sizes["text"] + layer]
        gradients = torch.autograd.grad(score, weights)
        heads = [w[..., 1:] * g[..., 1:].clamp_min(0) for w, g in zip(weights, gradients, strict=True)]
        maps = sum(heads) / len(heads) * attention_mask[..., None]
        side = math.isqrt(maps.shape[-1])
        return maps.reshape(*maps.shape[:2], side, side)
