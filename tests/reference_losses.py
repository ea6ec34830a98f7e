"""The losses on features as slow NumPy loops in float64, written from the equations: nothing of the package is used here."""
import itertools
import math

import numpy as np


def norm(v): return math.sqrt(sum(float(x) * float(x) for x in v))


def cosine(a, b):
    "Cosine of two vectors; 0 if one of them is the zero vector."
    na, nb = norm(a), norm(b)
    return float(np.dot(a, b)) / (na * nb) if na and nb else 0.


def pooled(x, window, pool):
    "(C,H,W) -> (C,h,w): windows side by side, those at the border keep the pixels they have."
    C, H, W = x.shape
    kh, kw = window
    out = np.zeros((C, -(-H // kh), -(-W // kw)))
    for i, j in itertools.product(range(out.shape[1]), range(out.shape[2])):
        part = x[:, i * kh:(i + 1) * kh, j * kw:(j + 1) * kw].reshape(C, -1)
        out[:, i, j] = part.mean(1) if pool == 'avg' else part.max(1)
    return out


def pair_wise(s, t, window=(2, 2), pool='avg', reach=None):
    "Mean over images and edges of squared cosine differences; edges: all ordered pairs, or those at Chebyshev distance <= reach."
    total = 0.
    for a, b in zip(s, t):
        a, b = pooled(a, window, pool), pooled(b, window, pool)
        places = list(itertools.product(range(a.shape[1]), range(a.shape[2])))
        edges = [(p, q) for p in places for q in places if reach is None or max(abs(p[0] - q[0]), abs(p[1] - q[1])) <= reach]
        at = lambda x, place: x[:, place[0], place[1]]
        gaps = [cosine(at(a, p), at(a, q)) - cosine(at(b, p), at(b, q)) if p != q else
                float(norm(at(a, p)) > 0) - float(norm(at(b, p)) > 0) for p, q in edges]
        total += sum(g * g for g in gaps) / len(edges)
    return total / len(s)


def local_affinity(s, t, kind):
    steps = [o for o in itertools.product((-1, 0, 1), repeat=2) if o != (0, 0)]
    B, _, H, W = s.shape
    total = 0.
    for a, b in zip(s, t):
        for i, j in itertools.product(range(1, H - 1), range(1, W - 1)):
            if kind == 'cosine':
                total += sum((cosine(a[:, i, j], a[:, i + y, j + x]) - cosine(b[:, i, j], b[:, i + y, j + x]))**2 for y, x in steps) / 8
            else:
                m = [sum(float(((o[:, i, j] - o[:, i + y, j + x])**2).sum()) for y, x in steps) for o in (a, b)]
                total += (m[0] - m[1])**2
    return total / (B * (H - 2) * (W - 2)) if H > 2 and W > 2 else 0.


def attention_transfer(s, t, p=2):
    total = 0.
    for a, b in zip(s, t):
        maps = [(np.abs(o)**p).mean(0).ravel() for o in (a, b)]
        maps = [m / norm(m) if norm(m) else m for m in maps]
        total += float(((maps[0] - maps[1])**2).sum())
    return total / s[:, 0].size


def intra_class_variation(s, t, labels, num_classes, ignore_index=255):
    B, _, H, W = s.shape
    small = labels[:, [i * labels.shape[1] // H for i in range(H)]][:, :, [j * labels.shape[2] // W for j in range(W)]]
    total = 0.
    for a, b, y in zip(s, t, small):
        for c in range(num_classes):
            inside = [(i, j) for i, j in itertools.product(range(H), range(W)) if y[i, j] == c]
            if not inside or c == ignore_index: continue
            centres = [sum(o[:, i, j] for i, j in inside) / len(inside) for o in (a, b)]
            total += sum((cosine(a[:, i, j], centres[0]) - cosine(b[:, i, j], centres[1]))**2 for i, j in inside)
    return total / (B * H * W)


def unit(v, q):
    n = float((np.abs(v)**q).sum()**(1 / q))
    return v / n if n else v


def adaptation(s, t, p=1, q=2):
    places = itertools.product(range(len(s)), range(s.shape[2]), range(s.shape[3]))
    gaps = [float((np.abs(unit(s[b, :, i, j], q) - unit(t[b, :, i, j], q))**p).sum()**(1 / p)) for b, i, j in places]
    return sum(gaps) / len(gaps)


def affinity(s, t, squared=False):
    total, m = 0., s.shape[2] * s.shape[3]
    for a, b in zip(s.reshape(*s.shape[:2], m), t.reshape(*t.shape[:2], m)):
        for i in range(m):
            row = [(cosine(a[:, i], a[:, j]) - cosine(b[:, i], b[:, j]))**2 if i != j else
                   float((norm(a[:, i]) > 0) != (norm(b[:, i]) > 0)) for j in range(m)]
            total += sum(row) / m if squared else math.sqrt(sum(row))
    return total / (len(s) * m)


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def normalized_logits(s, t):
    total = 0.
    for a, b in zip(s, t):
        p, q = softmax(b / b.std(ddof=1)), softmax(a / a.std(ddof=1))
        total += sum(float(x) * math.log(float(x) / float(y)) for x, y in zip(p, q) if x > 0)
    return total / len(s)


def dense_relation(s, t):
    def relation(z):
        d = np.array([[float(((a - b)**2).sum()) for b in z] for a in z])
        return np.array([row / norm(row) if norm(row) else row for row in d])
    return float(((relation(s) - relation(t))**2).sum()) / len(s)**2
