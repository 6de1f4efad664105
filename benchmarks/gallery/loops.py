"""The rules as training loops in plain torch, with the names of the arguments for hyperparameters.

`sqrt`, `sign`, `eigh` and the like are torch's, `norm` is that of all numbers of a tensor, and
`orthogonal` is `ORTHOGONAL`. `steps` counts from 1. They are written apart from the library, and
`tests/test_gallery.py` compares the two.
"""

ORTHOGONAL = """
def orthogonal(m, eps):
    x = m / (norm(m) + eps)
    for _ in range(ns_steps):
        a, b, c = ns_coeffs
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return x
"""

LOOPS = {
    "adam": """
mu = nu = 0 * p
for t in steps:
    g = grad(p)
    mu = b1 * mu + (1 - b1) * g
    nu = b2 * nu + (1 - b2) * g**2
    mu_hat, nu_hat = mu / (1 - b1**t), nu / (1 - b2**t)
    p = p - learning_rate * mu_hat / (sqrt(nu_hat + eps_root) + eps)
""",
    "adamw": """
mu = nu = 0 * p
for t in steps:
    g = grad(p)
    mu = b1 * mu + (1 - b1) * g
    nu = b2 * nu + (1 - b2) * g**2
    mu_hat, nu_hat = mu / (1 - b1**t), nu / (1 - b2**t)
    u = mu_hat / (sqrt(nu_hat + eps_root) + eps)
    p = p - learning_rate * (u + weight_decay * p)
""",
    "adamc": """
mu = nu = 0 * p
for t in steps:
    g = grad(p)
    mu = b1 * mu + (1 - b1) * g
    nu = b2 * nu + (1 - b2) * g**2
    u = mu / (1 - b1**t) / (sqrt(nu / (1 - b2**t) + eps_root) + eps)
    share = 1  # learning_rate / max_learning_rate, where there is a schedule
    p = p - learning_rate * (u + weight_decay * share * p)
""",
    "nadam": """
mu = nu = 0 * p
for t in steps:
    g = grad(p)
    mu = b1 * mu + (1 - b1) * g
    nu = b2 * nu + (1 - b2) * g**2
    m = b1 * mu / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
    p = p - learning_rate * m / (sqrt(nu / (1 - b2**t) + eps_root) + eps)
""",
    "nadamw": """
mu = nu = 0 * p
for t in steps:
    g = grad(p)
    mu = b1 * mu + (1 - b1) * g
    nu = b2 * nu + (1 - b2) * g**2
    m = b1 * mu / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
    u = m / (sqrt(nu / (1 - b2**t) + eps_root) + eps)
    p = p - learning_rate * (u + weight_decay * p)
""",
    "radam": """
mu = nu = 0 * p
rho_inf = 2 / (1 - b2) - 1
for t in steps:
    g = grad(p)
    mu = b1 * mu + (1 - b1) * g
    nu = b2 * nu + (1 - b2) * g**2
    u = mu / (1 - b1**t)
    rho = rho_inf - 2 * t * b2**t / (1 - b2**t)
    if rho >= threshold:
        r = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
        u = r**0.5 * u / (sqrt(nu / (1 - b2**t) + eps_root) + eps)
    p = p - learning_rate * u
""",
    "adamax": """
mu = nu = 0 * p
for t in steps:
    g = grad(p)
    mu = b1 * mu + (1 - b1) * g
    nu = maximum(b2 * nu, abs(g) + eps)
    p = p - learning_rate * mu / (1 - b1**t) / nu
""",
    "adamaxw": """
mu = nu = 0 * p
for t in steps:
    g = grad(p)
    mu = b1 * mu + (1 - b1) * g
    nu = maximum(b2 * nu, abs(g) + eps)
    p = p - learning_rate * (mu / (1 - b1**t) / nu + weight_decay * p)
""",
    "amsgrad": """
mu = nu = top = 0 * p
for t in steps:
    g = grad(p)
    mu = b1 * mu + (1 - b1) * g
    nu = b2 * nu + (1 - b2) * g**2
    top = maximum(top, nu / (1 - b2**t))
    p = p - learning_rate * mu / (1 - b1**t) / (sqrt(top + eps_root) + eps)
""",
    "adabelief": """
mu = nu = 0 * p
for t in steps:
    g = grad(p)
    mu = b1 * mu + (1 - b1) * g
    nu = b2 * nu + (1 - b2) * (g - mu) ** 2 + eps_root
    p = p - learning_rate * mu / (1 - b1**t) / (sqrt(nu / (1 - b2**t)) + eps)
""",
    "acprop": """
m = s = 0 * p
for t in steps:
    g = grad(p)
    u = g if t == 1 else g / (sqrt(s / (1 - b2 ** (t - 1))) + eps)
    m = b1 * m + (1 - b1) * g
    s = b2 * s + (1 - b2) * (g - m) ** 2 + eps_root
    p = p - learning_rate * (u + weight_decay * p)
""",
    "yogi": """
mu = nu = 0 * p + 1e-6
for t in steps:
    g = grad(p)
    mu = b1 * mu + (1 - b1) * g
    nu = nu - (1 - b2) * sign(nu - g**2) * g**2
    p = p - learning_rate * mu / (1 - b1**t) / (sqrt(nu / (1 - b2**t)) + eps)
""",
    "adopt": """
mu = 0 * p
for t in steps:
    g = grad(p)
    if t == 1:
        nu = g**2
        continue
    c = (t - 1) ** 0.25
    d = clip(g / clip(sqrt(nu), min=eps), -c, c)
    mu = b1 * mu + (1 - b1) * d
    nu = b2 * nu + (1 - b2) * g**2
    p = p - learning_rate * mu
""",
    "laprop": """
m = nu = 0 * p
for t in steps:
    g = grad(p)
    nu = b2 * nu + (1 - b2) * g**2
    m = b1 * m + (1 - b1) * g / (sqrt(nu / (1 - b2**t) + eps_root) + eps)
    p = p - learning_rate * (m / (1 - b1**t) + weight_decay * p)
""",
    "adan": """
m = v = n = 0 * p
last = None
for t in steps:
    g = grad(p)
    d = 0 * g if last is None else g - last
    last = g
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * d
    n = b3 * n + (1 - b3) * (g + b2 * d) ** 2
    u = m / (1 - b1**t) + b2 * v / (1 - b2**t)
    u = u / (sqrt(n / (1 - b3**t) + eps_root) + eps)
    p = p - learning_rate * (u + weight_decay * p)
""",
    "ademamix": """
m1 = m2 = nu = 0 * p
for t in steps:
    g = grad(p)
    m1 = b1 * m1 + (1 - b1) * g
    m2 = b3 * m2 + (1 - b3) * g
    nu = b2 * nu + (1 - b2) * g**2
    u = m1 / (1 - b1**t) + alpha * m2
    u = u / (sqrt(nu / (1 - b2**t) + eps_root) + eps)
    p = p - learning_rate * (u + weight_decay * p)
""",
    "simplified_ademamix": """
m = nu = 0 * p
for t in steps:
    g = grad(p)
    m = b1 * m + g
    nu = b2 * nu + (1 - b2) * g**2
    u = (m + alpha * g) / (sqrt(nu / (1 - b2**t) + eps_root) + eps)
    p = p - learning_rate * (u + weight_decay * p)
""",
    "mars_adamw": """
last = mu = nu = 0 * p
for t in steps:
    g = grad(p)
    c = g + gamma * b1 / (1 - b1) * (g - last)
    c = c / max(1, norm(c))
    last = g
    mu = b1 * mu + (1 - b1) * c
    nu = b2 * nu + (1 - b2) * c**2
    u = mu / (1 - b1**t) / (sqrt(nu / (1 - b2**t) + eps_root) + eps)
    p = p - learning_rate * (u + weight_decay * p)
""",
    "grams": """
mu = nu = 0 * p
for t in steps:
    g = grad(p)
    mu = b1 * mu + (1 - b1) * g
    nu = b2 * nu + (1 - b2) * g**2
    u = abs(mu) / (1 - b1**t) / (sqrt(nu / (1 - b2**t) + eps_root) + eps)
    p = p - learning_rate * (u * sign(g) + weight_decay * p)
""",
    "stable_adamw": """
m = nu = 0 * p
for t in steps:
    g = grad(p)
    m = b1 * m + (1 - b1) * g
    nu = b2 * nu + (1 - b2) * g**2
    m_hat, nu_hat = m / (1 - b1**t), nu / (1 - b2**t)
    rms = sqrt(mean(g**2 / clip(nu_hat, min=eps**2)))
    u = m_hat / (sqrt(nu_hat) + eps) + weight_decay * p
    p = p - learning_rate * u / max(1, rms)
""",
    "optimistic_adam_v2": """
mu = nu = 0 * p
last = None
for t in steps:
    g = grad(p)
    mu = b1 * mu + (1 - b1) * g
    nu = b2 * nu + (1 - b2) * g**2
    u = b1 * mu / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
    u = u / (sqrt(nu / (1 - b2**t) + eps_root) + eps)
    change = 0 if last is None else u - last
    last = u
    p = p - learning_rate * (alpha * u + beta * change)
""",
    "sgd": """
m = 0 * p
for t in steps:
    m = momentum * m + grad(p)
    p = p - learning_rate * m
""",
    "asgd": """
eta, mu, ax = learning_rate, 1, p
for t in steps:
    g = grad(p)
    p = p - eta * (g + lambd * p)
    ax = ax + mu * (p - ax)
    eta = learning_rate / (1 + lambd * learning_rate * t) ** alpha
    mu = 1 / max(1, t - t0)
""",
    "optimistic_gradient_descent": """
last = None
for t in steps:
    g = grad(p)
    change = 0 if last is None else g - last
    p = p - learning_rate * (alpha * g + beta * change)
    last = g
""",
    "sign_sgd": """
for t in steps:
    p = p - learning_rate * sign(grad(p))
""",
    "signum": """
m = 0 * p
for t in steps:
    m = beta * m + (1 - beta) * grad(p)
    p = p - learning_rate * sign(m)
""",
    "lion": """
mu = 0 * p
for t in steps:
    g = grad(p)
    u = sign(b1 * mu + (1 - b1) * g)
    mu = b2 * mu + (1 - b2) * g
    p = p - learning_rate * (u + weight_decay * p)
""",
    "focus": """
m = x = 0 * p
for t in steps:
    g = grad(p)
    m = b1 * m + (1 - b1) * g
    x = b2 * x + (1 - b2) * p
    x_hat = x / (1 - b2**t)
    pull = 0 if t == 1 else gamma * sign(p - x_hat)
    p = p - learning_rate * (sign(m) + pull + weight_decay * x_hat)
""",
    "rprop": """
size, last = 0 * p + learning_rate, 0 * p
for t in steps:
    g = grad(p)
    agree = g * last
    shorter = where(agree < 0, size * eta_minus, size)
    size = where(agree > 0, size * eta_plus, shorter)
    size = clip(size, min_step_size, max_step_size)
    last = (agree >= 0) * g
    p = p - size * sign(last)
""",
    "adagrad": """
total = 0 * p + initial_accumulator_value
for t in steps:
    g = grad(p)
    total = total + g**2
    p = p - learning_rate * g / sqrt(total + eps)
""",
    "rmsprop": """
nu = 0 * p + initial_scale
for t in steps:
    g = grad(p)
    nu = decay * nu + (1 - decay) * g**2
    p = p - learning_rate * g / sqrt(nu + eps)
""",
    "adadelta": """
e_g = e_x = 0 * p
for t in steps:
    g = grad(p) + weight_decay * p
    e_g = rho * e_g + (1 - rho) * g**2
    u = g * sqrt(e_x + eps) / sqrt(e_g + eps)
    e_x = rho * e_x + (1 - rho) * u**2
    p = p - learning_rate * u
""",
    "madgrad": """
x0, s, nu = p, 0 * p, 0 * p
for t in steps:
    g = grad(p) + weight_decay * p
    lamb = (learning_rate + eps) * t**0.5
    s = s + lamb * g
    nu = nu + lamb * g**2
    z = x0 - s / (nu ** (1 / 3) + eps)
    p = momentum * p + (1 - momentum) * z
""",
    "lars": """
m = 0 * p
for t in steps:
    g = grad(p) + weight_decay * p
    u = g * trust_coefficient * norm(p) / (norm(g) + eps)
    m = momentum * m + learning_rate * u
    p = p - m
""",
    "lamb": """
mu = nu = 0 * p
for t in steps:
    g = grad(p)
    mu = b1 * mu + (1 - b1) * g
    nu = b2 * nu + (1 - b2) * g**2
    u = mu / (1 - b1**t) / (sqrt(nu / (1 - b2**t) + eps_root) + eps)
    u = u + weight_decay * p
    p = p - learning_rate * u * norm(p) / norm(u)
""",
    "fromage": """
for t in steps:
    g = grad(p)
    u = g * max(norm(p), min_norm) / max(norm(g), min_norm)
    p = (p - learning_rate * u) / (1 + learning_rate**2) ** 0.5
""",
    "novograd": """
mu = 0 * p
for t in steps:
    g = grad(p)
    nu = norm(g) ** 2 if t == 1 else b2 * nu + (1 - b2) * norm(g) ** 2
    mu = b1 * mu + g / (sqrt(nu + eps_root) + eps) + weight_decay * p
    p = p - learning_rate * mu
""",
    "muon": """
mu = 0 * p
for t in steps:
    g = grad(p)
    mu = beta * mu + (1 - beta) * g
    m = beta * mu / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
    n, k = p.shape
    u = max(1, n / k) ** 0.5 * orthogonal(m, eps)
    p = p - learning_rate * (u + weight_decay * p)
""",
    "muon_with_adamw": """
mu = 0 * p
for t in steps:  # of a hidden matrix; all else goes to AdamW
    g = grad(p)
    mu = beta * mu + (1 - beta) * g
    m = beta * mu / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
    n, k = p.shape
    u = max(1, n / k) ** 0.5 * orthogonal(m, 1e-8)
    p = p - learning_rate * (u + weight_decay * p)
""",
    "normuon": """
mu = v = 0 * p
for t in steps:
    g = grad(p)
    mu = beta * mu + (1 - beta) * g
    o = orthogonal(beta * mu + (1 - beta) * g, 1e-7)
    v = b2 * v + (1 - b2) * mean(o**2, dim=1, keepdim=True)
    r = o / (sqrt(v) + eps)
    n, k = p.shape
    u = max(1, n / k) ** 0.5 * r * norm(o) / (norm(r) + eps)
    p = p - learning_rate * (u + weight_decay * p)
""",
    "adamuon": """
mu = v = 0 * p
for t in steps:
    g = grad(p)
    mu = beta * mu + (1 - beta) * g
    o = orthogonal(sign(beta * mu + (1 - beta) * g), 1e-7)
    v = beta * v + (1 - beta) * o**2
    r = o / (sqrt(v) + eps)
    n, k = p.shape
    u = 0.2 * (n * k) ** 0.5 * r / (norm(r) + eps)
    p = p - learning_rate * (u + weight_decay * p)
""",
    "muonh": """
mu = 0 * p
for t in steps:
    g = grad(p)
    mu = beta * mu + (1 - beta) * g
    m = beta * mu / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
    u = orthogonal(m, eps)
    q = p - learning_rate * norm(p) * u / norm(u)
    p = norm(p) * q / norm(q)
""",
    "mano": """
mu = 0 * p
for t in steps:
    mu = beta * mu + grad(p)
    dim = (t - 1) % 2
    q = p / clip(norm(p, dim), min=eps)
    d = mu - (mu * q).sum(dim, keepdim=True) * q
    u = 0.2 * p.shape[dim] ** 0.5 * d / clip(norm(d, dim), min=eps)
    p = p - learning_rate * (u + weight_decay * p)
""",
    "scion": """
mu = 0 * p
for t in steps:
    mu = b1 * mu + (1 - b1) * grad(p)
    n, k = p.shape
    u = radius * (n / k) ** 0.5 * orthogonal(mu, 1e-7)  # where it is "hidden"
    p = p - learning_rate * (u + p)
""",
    "soap": """
mu = nu = 0 * p
for t in steps:  # with weights at rest
    G = grad(p)
    if t == 1:
        L, R = (1 - b2) * G @ G.T, (1 - b2) * G.T @ G
        Q, S = eigh(L).eigenvectors.flip(1), eigh(R).eigenvectors.flip(1)
        continue
    h = Q.T @ G @ S
    mu = b1 * mu + (1 - b1) * G
    nu = b2 * nu + (1 - b2) * h**2
    u = Q @ (Q.T @ mu @ S / (sqrt(nu) + eps)) @ S.T
    u = (1 - b2 ** (t - 1)) ** 0.5 / (1 - b1 ** (t - 1)) * u
    L = b2 * L + (1 - b2) * G @ G.T
    R = b2 * R + (1 - b2) * G.T @ G
    p = p - learning_rate * u
    p = p - learning_rate * weight_decay * p
    if (t - 1) % frequency == 0:  # with the columns in the order of their eigenvalues
        i, j = (Q.T @ L @ Q).diagonal(), (S.T @ R @ S).diagonal()
        i, j = argsort(i, descending=True), argsort(j, descending=True)
        Q, S, nu = qr(L @ Q[:, i]).Q, qr(R @ S[:, j]).Q, nu[i][:, j]
""",
    "adafactor": """
row = col = 0
for t in steps:
    g = grad(p)
    b2 = 1 - t**-decay_rate
    row = b2 * row + (1 - b2) * mean(g**2 + 1e-30, dim=1, keepdim=True)
    col = b2 * col + (1 - b2) * mean(g**2 + 1e-30, dim=0, keepdim=True)
    u = g / sqrt(row * col / mean(row))
    u = u / max(1, rms(u) / clipping_threshold)
    p = p - learning_rate * max(1e-3, rms(p)) * u
""",
    "came": """
mu = row = col = r_row = r_col = 0
for t in steps:
    g = grad(p)
    row = b2 * row + (1 - b2) * mean(g**2 + eps, dim=1, keepdim=True)
    col = b2 * col + (1 - b2) * mean(g**2 + eps, dim=0, keepdim=True)
    u = g / sqrt(row * col / mean(row))
    u = u / max(1, rms(u) / clipping_threshold)
    mu = b1 * mu + (1 - b1) * u
    off = (u - mu) ** 2 + instability_eps
    r_row = b3 * r_row + (1 - b3) * mean(off, dim=1, keepdim=True)
    r_col = b3 * r_col + (1 - b3) * mean(off, dim=0, keepdim=True)
    u = mu / sqrt(r_row * r_col / mean(r_row))
    p = p - learning_rate * (u + weight_decay * p)
""",
    "sm3": """
m = 0 * p
rows, columns = 0 * p[:, :1], 0 * p[:1]
for t in steps:
    g = grad(p)
    nu = minimum(rows, columns) + g**2
    rows, columns = amax(nu, 1, keepdim=True), amax(nu, 0, keepdim=True)
    m = momentum * m + (1 - momentum) * g / sqrt(nu + 1e-8)
    p = p - learning_rate * m
""",
    "adam_mini": """
m, nu = 0 * p, 0
for t in steps:
    g = grad(p)
    m = b1 * m + (1 - b1) * g
    nu = b2 * nu + (1 - b2) * mean(g**2)  # over a block; here it is the whole tensor
    u = m / (1 - b1**t) / (sqrt(nu / (1 - b2**t)) + eps)
    p = p - learning_rate * (u + weight_decay * p)
""",
    "galore": """
mu = nu = 0
for t in steps:  # p is tall
    X = grad(p)
    if (t - 1) % update_proj_gap == 0:
        B = svd(X).Vh[:rank]
    s = X @ B.T
    mu = b1 * mu + (1 - b1) * s
    nu = b2 * nu + (1 - b2) * s**2
    d = mu / (sqrt(nu) + eps)
    u = scale * (1 - b2**t) ** 0.5 / (1 - b1**t) * d @ B
    p = p - learning_rate * u
    p = p - learning_rate * weight_decay * p
""",
    "fira": """
mu = nu = 0
last = None
for t in steps:  # p is tall
    X = grad(p)
    if (t - 1) % update_proj_gap == 0:
        B = svd(X).Vh[:rank]
    s = X @ B.T
    mu = b1 * mu + (1 - b1) * s
    nu = b2 * nu + (1 - b2) * s**2
    d = mu / (sqrt(nu) + eps)
    f = norm(d, 1) / (norm(s, 1) + 1e-8)
    w = f * (X - scale * s @ B)
    w = w if last is None else w / max(1, norm(w) / (1.01 * last))
    last = norm(w)
    u = (1 - b2**t) ** 0.5 / (1 - b1**t) * (scale * d @ B + w)
    p = p - learning_rate * u
    p = p - learning_rate * weight_decay * p
""",
    "prodigy": """
b1, b2 = betas
b3 = b2**0.5
x0, m, v, s, r, d, d0 = p, 0 * p, 0 * p, 0 * p, 0, estim_lr0, estim_lr0
for t in steps:
    g = grad(p)
    a = d * learning_rate
    m = b1 * m + (1 - b1) * d * g
    v = b2 * v + (1 - b2) * (d * g) ** 2
    s = b3 * s + d / d0 * a * g
    r = b3 * r + d / d0 * a * (g * (x0 - p)).sum()
    d = max(d, estim_lr_coef * r / abs(s).sum())
    p = p - a * weight_decay * p - a * m / (sqrt(v) + d * eps)
""",
    "dadapt_adamw": """
b1, b2 = betas
b3 = b2**0.5
m, v, s, r, d = 0 * p, 0 * p, 0 * p, 0, estim_lr0
for t in steps:
    g = grad(p)
    a = d * learning_rate * (1 - b2**t) ** 0.5 / (1 - b1**t)
    r = b3 * r + (1 - b3) * a * (g * s / (sqrt(v) + eps)).sum()
    m = b1 * m + (1 - b1) * a * g
    v = b2 * v + (1 - b2) * g**2
    s = b3 * s + (1 - b3) * a * g
    d = max(d, r / ((1 - b3) * abs(s).sum()))
    p = p - a * weight_decay * p - m / (sqrt(v) + eps)
""",
    "dog": """
p0, G = p, 0
r = 1e-6 * (1 + norm(p))
for t in steps:
    g = grad(p) + weight_decay * p
    r = max(r, norm(p - p0))
    G = G + norm(g) ** 2
    p = p - learning_rate * r / sqrt(G + eps) * g
""",
    "dowg": """
p0, G = p, 0
s = eps
for t in steps:
    g = grad(p) + weight_decay * p
    s = max(s, norm(p - p0) ** 2)
    G = G + s * norm(g) ** 2
    p = p - learning_rate * s / (sqrt(G) + eps) * g
""",
    "cocob": """
p0, L, G, R, C = p, 0 * p + eps, 0 * p, 0 * p, 0 * p
for t in steps:
    g = learning_rate * (grad(p) + weight_decay * p)
    L = maximum(L, abs(g))
    G = G + abs(g)
    R = clip(R - g * (p - p0), min=0)
    C = C - g
    p = p0 + C * (L + R) / (L * maximum(G + L, alpha * L))
""",
    "momo": """
m, f, c = 0, 0, 0
for t in steps:
    g, value = grad(p), loss(p)
    b = 0 if t == 1 else beta
    m = b * m + (1 - b) * g
    f = b * f + (1 - b) * value
    c = b * c + (1 - b) * (g * p).sum()
    h = (1 + learning_rate * weight_decay) * (f - c - lower_bound) + (m * p).sum()
    tau = min(learning_rate, max(h, 0) / (m * m).sum())
    p = p / (1 + learning_rate * weight_decay) - tau * m
""",
    "momo_adam": """
m, f, c, nu = 0, 0, 0, 0
for t in steps:
    g, value = grad(p), loss(p)
    m = b1 * m + (1 - b1) * g
    nu = b2 * nu + (1 - b2) * g**2
    f = b1 * f + (1 - b1) * value
    c = b1 * c + (1 - b1) * (g * p).sum()
    bias = 1 - b1**t
    D = sqrt(nu / (1 - b2**t)) + eps
    room = f - c - bias * lower_bound
    h = (1 + learning_rate * weight_decay) * room + (m * p).sum()
    tau = min(learning_rate / bias, max(h, 0) / (m * m / D).sum())
    p = p / (1 + learning_rate * weight_decay) - tau * m / D
""",
    "polyak_sgd": """
for t in steps:
    g = scaling * grad(p)
    size = (loss(p) - f_min) / (norm(g) ** 2 + eps)
    p = p - min(max_learning_rate, size) * g
""",
    "schedule_free_adamw": """
x, z, nu, total = p, p, 0 * p, 0
for t in steps:  # p is y, where the gradient is taken; evaluate x
    g = grad(p)
    nu = b2 * nu + (1 - b2) * g**2
    u = g / (sqrt(nu / (1 - b2**t)) + eps) + weight_decay * p
    z = z - learning_rate * u
    total = total + t**r
    x = x + t**r / total * (z - x)
    p = (1 - b1) * z + b1 * x
""",
    "schedule_free_sgd": """
x, z, total = p, p, 0
for t in steps:  # p is y, where the gradient is taken; evaluate x
    z = z - learning_rate * (grad(p) + weight_decay * p)
    total = total + t**r
    x = x + t**r / total * (z - x)
    p = (1 - b1) * z + b1 * x
""",
    "schedule_free_radam": """
x, z, nu = p, p, 0 * p
largest = total = 0
rho_inf = 2 / (1 - b2) - 1
for t in steps:  # p is y, where the gradient is taken; evaluate x
    g = grad(p)
    nu = b2 * nu + (1 - b2) * g**2
    rho = rho_inf - 2 * t * b2**t / (1 - b2**t)
    if rho > 4:
        q = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
        a, d = q**0.5 * learning_rate, g / (sqrt(nu / (1 - b2**t)) + eps)
    else:
        a, d = 0.0, g
    z = z - a * (d + weight_decay * p)
    largest = max(largest, a)
    w = t**r * largest**weight_lr_power
    total = total + w
    c = w / total if total else 0
    x = (1 - c) * x + c * z
    p = (1 - b1) * z + b1 * x
""",
    "splus": """
mu, Q, S = 0 * p, eye(p.shape[0]), eye(p.shape[1])
L, R = 0 * Q, 0 * S
n, k = p.shape
for t in steps:
    G = grad(p)
    mu = b1 * mu + (1 - b1) * G
    u = 2 / (n + k) * Q @ sign(Q.T @ mu @ S) @ S.T
    L = b2 * L + (1 - b2) * G @ G.T
    R = b2 * R + (1 - b2) * G.T @ G
    if t == 1 or t % frequency == 0:
        Q, S = eigh(L).eigenvectors, eigh(R).eigenvectors
    p = p - learning_rate * u
    p = p - learning_rate * weight_decay * 2 / (n + k) * p
""",
    "kl_soap": """
mu = nu = 0 * p
n, k = p.shape
b3 = b2
for t in steps:
    G = grad(p)
    if t == 1:
        L, R = (1 - b3) * G @ G.T / k, (1 - b3) * G.T @ G / n
        Q, S = eigh(L).eigenvectors.flip(1), eigh(R).eigenvectors.flip(1)
        A, B = 0 * p[:, :1] + init**-0.5, 0 * p[:1] + init**-0.5
        continue
    h = Q.T @ G @ S
    mu = b1 * mu + (1 - b1) * G
    nu = b2 * nu + (1 - b2) * h**2
    u = Q @ (Q.T @ mu @ S / (sqrt(nu) + eps)) @ S.T
    X, Y = G @ S * B, A * (Q.T @ G)
    L, R = b3 * L + (1 - b3) * X @ X.T / k, b3 * R + (1 - b3) * Y.T @ Y / n
    x, y = mean((h * B) ** 2, 1, keepdim=True), mean((h * A) ** 2, 0, keepdim=True)
    A = clip(1 / sqrt(b3 / A**2 + (1 - b3) * x), max=max(10, n))
    B = clip(1 / sqrt(b3 / B**2 + (1 - b3) * y), max=max(10, k))
    p = p - learning_rate * u
    p = p - learning_rate * weight_decay * p
    if (t - 1) % frequency == 0:
        Q, S = qr(L @ Q).Q, qr(R @ S).Q
""",
    "kl_shampoo": """
mu = 0 * p
n, k = p.shape
b3 = b2
for t in steps:
    G = grad(p)
    if t == 1:
        L, R = (1 - b3) * G @ G.T / k, (1 - b3) * G.T @ G / n
        Q, S = eigh(L).eigenvectors.flip(1), eigh(R).eigenvectors.flip(1)
        A, B = 0 * p[:, :1] + init**-0.5, 0 * p[:1] + init**-0.5
        continue
    h = Q.T @ G @ S
    mu = b1 * mu + (1 - b1) * G
    w = A * B
    u = Q @ (Q.T @ mu @ S * w / (1 + eps * w)) @ S.T
    X, Y = G @ S * B, A * (Q.T @ G)
    L, R = b3 * L + (1 - b3) * X @ X.T / k, b3 * R + (1 - b3) * Y.T @ Y / n
    x, y = mean((h * B) ** 2, 1, keepdim=True), mean((h * A) ** 2, 0, keepdim=True)
    A = clip(1 / sqrt(b3 / A**2 + (1 - b3) * x), max=max(10, n))
    B = clip(1 / sqrt(b3 / B**2 + (1 - b3) * y), max=max(10, k))
    p = p - learning_rate * u
    p = p - learning_rate * weight_decay * p
    if (t - 1) % frequency == 0:
        Q, S = qr(L @ Q).Q, qr(R @ S).Q
""",
    "shampoo": """
def root(x):
    values, vectors = eigh(x)
    return vectors * (clip(values, min=0) + eps) ** (-1 / 4) @ vectors.T

mu = nu = L = R = 0
for t in steps:  # L and R are sums, by the defaults
    G = grad(p)
    mu = b1 * mu + (1 - b1) * G
    nu = graft_b2 * nu + (1 - graft_b2) * G**2
    L, R = L + G @ G.T, R + G.T @ G
    m = mu / (1 - b1**t)
    s = root(L) @ m @ root(R)
    d = m / (sqrt(nu / (1 - graft_b2**t)) + graft_eps)
    p = p - learning_rate * (s * norm(d) / norm(s) + weight_decay * p)
""",
    "schedule_free_prodigy": """
b1, b2 = betas
b3 = b2**0.5
x, x0, z, v, s, r, d, d0 = p, p, p, 0 * p, 0 * p, 0, estim_lr0, estim_lr0
largest = total = 0
for t in steps:  # p is y, where the gradient is taken; evaluate x
    g = grad(p)
    a = d * learning_rate
    v = b2 * v + (1 - b2) * (d * g) ** 2
    s = b3 * s + d / d0 * a * g
    r = b3 * r + d / d0 * a * (g * (x0 - z)).sum()
    d = max(d, estim_lr_coef * r / abs(s).sum())
    z = z - a * weight_decay * z - a * d * g / (sqrt(v) + d * eps)  # a has the old d
    largest = max(largest, learning_rate * d)
    w = largest**weight_lr_power
    total = total + w
    x = x + w / total * (z - x)
    p = (1 - b1) * z + b1 * x
""",
}
