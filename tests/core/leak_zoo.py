"""Models in which errors would go round cuts at activations, as people write them: small, with few words."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, width: int, causal: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.causal = nn.Linear(width, 3 * width), nn.Linear(width, width), causal

    def forward(self, x: Tensor) -> Tensor:
        batch, places, width = x.shape
        q, k, v = (t.view(batch, places, 2, width // 2).transpose(1, 2) for t in self.qkv(x).split(width, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(batch, places, width))


class Block(nn.Module):
    """Pre-norm, with a functional activation."""

    def __init__(self, width: int = 8, causal: bool = True) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, causal)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Gpt(nn.Module):
    def __init__(self, vocabulary: int = 7, width: int = 8, context: int = 9) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1]))
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


class Vit(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.answer, self.positions = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.randn(1, 5, width))
        self.blocks = nn.Sequential(*(Block(width, causal=False) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.answer.expand(len(x), -1, -1), h], 1) + self.positions
        return self.head(self.norm(self.blocks(h))[:, 0])


class Feed(nn.Module):
    """A residual stream of dense layers with an activation module."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


def stream() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), Feed(), Feed(), nn.Linear(8, 4))


class PreActivation(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c_in), nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(c_out), nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv2(F.relu(self.bn2(self.conv1(out))))
        out += shortcut
        return out


class Pooled(nn.Module):
    """Functional average pooling and a linear read-out behind any feature maps of four places a side."""

    def __init__(self, features: nn.Module, channels: int) -> None:
        super().__init__()
        self.features, self.linear = features, nn.Linear(channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        out = F.avg_pool2d(self.features(x), 4)
        return self.linear(out.view(out.size(0), -1))


def pre_activation() -> nn.Module:
    blocks = (PreActivation(8, 8, 1), PreActivation(8, 8, 1), PreActivation(8, 16, 2), PreActivation(16, 16, 1))
    return Pooled(nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1, bias=False), *blocks), 16)


class Dense(nn.Module):
    def __init__(self, c_in: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c_in), nn.Conv2d(c_in, 8, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        return torch.cat([self.conv2(F.relu(self.bn2(out))), x], 1)


class Transition(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(16), nn.Conv2d(16, 8, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(x))


def dense_net() -> nn.Module:
    stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    return Pooled(nn.Sequential(stem, Dense(8), Dense(12), Transition(), Dense(8), Dense(12), Normed()), 16)


class Bottleneck(nn.Module):
    """MobileNet's: wide in the middle, linear at its end."""

    def __init__(self, c_in: int, c_out: int, expansion: int, stride: int) -> None:
        super().__init__()
        wide, self.stride = expansion * c_in, stride
        self.conv1, self.bn1 = nn.Conv2d(c_in, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self.conv2 = nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False)
        self.bn2, self.conv3, self.bn3 = nn.BatchNorm2d(wide), nn.Conv2d(wide, c_out, 1, bias=False), nn.BatchNorm2d(c_out)
        self.shortcut = nn.Sequential()
        if stride == 1 and c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(out)))))
        return out + self.shortcut(x) if self.stride == 1 else out


class Stem(nn.Module):
    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(c_in, c_out, 3, 1, 1, bias=False), nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def mobile_net() -> nn.Module:
    blocks = (Bottleneck(8, 8, 1, 1), Bottleneck(8, 12, 2, 1), Bottleneck(12, 12, 2, 2), Bottleneck(12, 12, 2, 1))
    return Pooled(nn.Sequential(Stem(3, 8), *blocks, Stem(12, 16)), 16)


class Squeezed(nn.Module):
    """SENet's block: channels weighted by what the block sees of them."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False), nn.BatchNorm2d(c_out)
        self.fc1, self.fc2 = nn.Conv2d(c_out, c_out // 4, 1), nn.Conv2d(c_out // 4, c_out, 1)
        self.shortcut = nn.Sequential()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        share = torch.sigmoid(self.fc2(F.relu(self.fc1(F.avg_pool2d(out, out.size(2))))))
        out = out * share
        out += self.shortcut(x)
        return F.relu(out)


def se_net() -> nn.Module:
    return Pooled(nn.Sequential(Stem(3, 8), Squeezed(8, 8, 1), Squeezed(8, 16, 2)), 16)


def vgg() -> nn.Module:
    layers: list[nn.Module] = []
    channels = 3
    for width in (8, 0, 8, 8, 0, 16, 0):
        if width:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        else:
            layers.append(nn.MaxPool2d(2, 2))
    return nn.Sequential(*layers, nn.AvgPool2d(1, 1), nn.Flatten(), nn.Linear(16, 4))


class Double(nn.Sequential):
    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__(
            *(nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)),
            *(nn.Conv2d(c_out, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)),
        )


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = Double(3, 4), Double(4, 8), Double(8, 16)
        self.up1, self.d, self.e = nn.ConvTranspose2d(16, 8, 2, 2), Double(16, 8), Double(8, 4)
        self.up2, self.out = nn.ConvTranspose2d(8, 4, 2, 2), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(F.max_pool2d(a, 2))
        h = self.d(torch.cat([b, self.up1(self.c(F.max_pool2d(b, 2)))], 1))
        return self.out(self.e(torch.cat([a, self.up2(h)], 1)))


class Mnist(nn.Module):
    """PyTorch's basic MNIST example, word for word."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, 1)
        self.conv2 = nn.Conv2d(32, 64, 3, 1)
        self.dropout1 = nn.Dropout(0.25)
        self.dropout2 = nn.Dropout(0.5)
        self.fc1 = nn.Linear(9216, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = F.relu(x)
        x = self.conv2(x)
        x = F.relu(x)
        x = F.max_pool2d(x, 2)
        x = self.dropout1(x)
        x = torch.flatten(x, 1)
        x = self.fc1(x)
        x = F.relu(x)
        x = self.dropout2(x)
        x = self.fc2(x)
        output = F.log_softmax(x, dim=1)
        return output


class Rnn(nn.Module):
    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.ih, self.hh, self.out, self.act = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4), act

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 8)
        for t in range(x.shape[1]):
            h = (self.act or torch.tanh)(self.ih(x[:, t]) + self.hh(h))
        return self.out(h)


class Gru(nn.Module):
    """Gates are cut by activations, and the state goes past all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.ih, self.hh, self.out = nn.Linear(6, 24), nn.Linear(8, 24), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 8)
        for t in range(x.shape[1]):
            (a, b, c), (d, e, f) = self.ih(x[:, t]).chunk(3, 1), self.hh(h).chunk(3, 1)
            r, z = torch.sigmoid(a + d), torch.sigmoid(b + e)
            h = (1 - z) * torch.tanh(c + r * f) + z * h
        return self.out(h)


class Lstm(nn.Module):
    """An answer at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.ih, self.hh, self.out = nn.Linear(6, 32), nn.Linear(8, 32), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), 8)
        outputs = []
        for t in range(x.shape[1]):
            i, f, g, o = (self.ih(x[:, t]) + self.hh(h)).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            outputs.append(self.out(h))
        return torch.stack(outputs, 1)


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class Leaky(nn.Module):
    """A user's activation that nobody knows."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, 0.1 * x)


def own(kind: type[nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), kind(), nn.Linear(8, 8), kind(), nn.Linear(8, 4))


class SkipBefore(nn.Module):
    """A skip taken before the activation, over the whole network; `x.relu()` and its result in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.c(self.b(h.relu()).relu_() + h)


class InPlace(nn.Module):
    """Results of functions in place that nobody looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.act = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        F.relu_(h)
        h = self.b(h)
        self.act(h)
        return self.c(h)


class InPlaceStream(nn.Module):
    """A residual stream that is added to in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x += self.b(F.relu(x))
        x.add_(self.c(F.relu(x)))
        return self.d(x)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.f, self.head = nn.Embedding(7, 8), nn.Linear(8, 8), nn.Linear(8, 7, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.silu(self.f(self.tokens(x))))


class Masked(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * (torch.arange(self.weight.numel()).view_as(self.weight) % 2), self.bias)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, w / w.std((1, 2, 3), keepdim=True), self.bias)


def functions_of_weights() -> nn.Module:
    return nn.Sequential(
        *(Standardised(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), Standardised(8, 8, 3), nn.ReLU(), nn.Flatten()),
        *(Masked(128, 8), nn.Tanh(), nn.Linear(8, 4)),
    )


class ByFunction(nn.Module):
    """A layer whose weight is used by a function only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        return self.c(h + F.linear(torch.tanh(F.linear(h, self.b.weight, self.b.bias)), self.b.weight))


class Depth(nn.Module):
    """Stochastic depth."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(6, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList(Feed() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        for block in self.blocks:
            if not self.training or torch.rand(()) > 0.5:
                h = block(h)
        return self.c(h)


def vectors() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 6), torch.arange(8) % 4


def images() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 3, 8, 8), torch.arange(8) % 4


def tokens(length: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randint(7, (4, length)), torch.randint(7, (4, length))


def sequences(steps: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(8, steps, 6), torch.arange(8) % 4


def token_loss(output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), targets.flatten())


# model, batch, loss, names of parameters with exact derivatives, what the last unit holds
ZOO = {
    "stream": (stream, vectors, F.cross_entropy, (), ("3.",)),
    "gpt": (Gpt, tokens, token_loss, (), ("head.",)),
    "vit": (Vit, images, F.cross_entropy, ("answer", "positions"), ("head.",)),
    "pre-activation": (pre_activation, images, F.cross_entropy, (), ("linear.",)),
    "dense-net": (dense_net, images, F.cross_entropy, (), ("linear.",)),
    "mobile-net": (mobile_net, images, F.cross_entropy, (), ("linear.",)),
    "se-net": (se_net, images, F.cross_entropy, (), ("linear.",)),
    "vgg": (vgg, images, F.cross_entropy, (), ("17.",)),
    "u-net": (
        UNet,
        lambda: (torch.randn(2, 3, 8, 8), torch.randint(4, (2, 8, 8))),
        F.cross_entropy,
        (),
        ("out.",),
    ),
    "mnist": (Mnist, lambda: (torch.randn(4, 1, 28, 28), torch.arange(4)), F.nll_loss, (), ("fc2.",)),
    "rnn": (Rnn, sequences, F.cross_entropy, (), ("out.",)),
    "gru": (Gru, sequences, F.cross_entropy, (), ("out.",)),
    "lstm": (Lstm, lambda: (torch.randn(8, 5, 6), torch.randint(4, (8, 5))), token_loss, (), ("out.",)),
    "swish": (lambda: own(Swish), vectors, F.cross_entropy, (), ("4.",)),
    "leaky": (lambda: own(Leaky), vectors, F.cross_entropy, (), ("4.",)),
    "linear": (lambda: own(nn.Identity), vectors, F.cross_entropy, (), ("4.",)),
    "skip": (SkipBefore, vectors, F.cross_entropy, (), ("c.",)),
    "in-place": (InPlace, vectors, F.cross_entropy, (), ("c.",)),
    "in-place-stream": (InPlaceStream, vectors, F.cross_entropy, (), ("d.",)),
    "tied": (Tied, tokens, token_loss, (), ("tokens.",)),
    "functions-of-weights": (functions_of_weights, images, F.cross_entropy, (), ("8.",)),
    "by-function": (ByFunction, vectors, F.cross_entropy, (), ("c.",)),
    "depth": (Depth, vectors, F.cross_entropy, (), ("c.",)),
}
