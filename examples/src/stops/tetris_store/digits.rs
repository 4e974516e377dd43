//! Two classifiers of handwritten digits: one tells the digit, the other was fine-tuned from it to
//! tell whether the digit is even. They have their first two layers in common.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::{D, DType, Device, Tensor, Var};
use candle_nn::{AdamW, Linear, Module, Optimizer, ParamsAdamW, VarBuilder, VarMap, linear, loss};
use carlsbad_kit::seed::Rng;

/// The digits, as they come with the source.
const DIGITS: &str = include_str!("../../../data/digits/digits.csv");
const PIXELS: usize = 64;
/// Of every this many digits one is kept out of the training, to test with.
const HELD_OUT: usize = 5;
const HIDDEN: usize = 1024;
const LAST_HIDDEN: usize = 256;
const BATCH: usize = 64;
/// The training is repeatable: same seed, same weights.
const SEED: u64 = 1998;

/// Images, one a row, and what is in them.
pub(super) struct Digits {
    pub(super) images: Tensor,
    labels: Vec<u32>,
}

impl Digits {
    /// Those to train with, and those held out.
    pub(super) fn load() -> Result<(Self, Self)> {
        let mut sets = [(Vec::new(), Vec::new()), (Vec::new(), Vec::new())];
        for (i, line) in DIGITS.lines().enumerate() {
            let numbers: Vec<u32> = line
                .split(',')
                .map(str::parse)
                .collect::<Result<_, _>>()
                .with_context(|| format!("digits.csv, line {}", i + 1))?;
            ensure!(numbers.len() == PIXELS + 1, "digits.csv, line {}", i + 1);
            let (pixels, labels) = &mut sets[usize::from(i % HELD_OUT == 0)];
            pixels.extend(numbers[..PIXELS].iter().map(|pixel| *pixel as f32 / 16.0));
            labels.push(numbers[PIXELS]);
        }
        let [train, test] = sets.map(|(pixels, labels)| {
            let shape = (labels.len(), PIXELS);
            Tensor::from_vec(pixels, shape, &Device::Cpu).map(|images| Self { images, labels })
        });
        Ok((train?, test?))
    }

    fn labels_of(&self, task: Task) -> Vec<u32> {
        let label = |digit: &u32| match task {
            Task::Digit => *digit,
            Task::Even => u32::from(digit.is_multiple_of(2)),
        };
        self.labels.iter().map(label).collect()
    }

    /// The share of rows of `outputs` whose largest number is where the label says.
    pub(super) fn accuracy(&self, task: Task, outputs: &Tensor) -> Result<f64> {
        let found: Vec<u32> = outputs.argmax(D::Minus1)?.to_vec1()?;
        let labels = self.labels_of(task);
        let right = found.iter().zip(&labels).filter(|(a, b)| a == b).count();
        Ok(right as f64 / labels.len() as f64)
    }
}

/// What a classifier tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) enum Task {
    Digit,
    Even,
}

impl Task {
    const fn classes(self) -> usize {
        match self {
            Self::Digit => 10,
            Self::Even => 2,
        }
    }

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Digit => "digit",
            Self::Even => "even-or-odd",
        }
    }
}

/// The network: an ordinary candle model, which knows nothing of any store.
pub(super) struct Network {
    layers: [Linear; 4],
}

impl Network {
    pub(super) fn new(task: Task, weights: &VarBuilder<'_>) -> candle_core::Result<Self> {
        let layer = |inputs, outputs, name| linear(inputs, outputs, weights.pp(name));
        Ok(Self {
            layers: [
                layer(PIXELS, HIDDEN, "layer1")?,
                layer(HIDDEN, HIDDEN, "layer2")?,
                layer(HIDDEN, LAST_HIDDEN, "layer3")?,
                layer(LAST_HIDDEN, task.classes(), "head")?,
            ],
        })
    }

    /// Its outputs for all digits of a set, a batch at a time.
    pub(super) fn answer(&self, digits: &Digits) -> candle_core::Result<Tensor> {
        let count = digits.labels.len();
        let mut outputs = Vec::new();
        for start in (0..count).step_by(BATCH) {
            let batch = digits.images.narrow(0, start, BATCH.min(count - start))?;
            outputs.push(self.forward(&batch)?);
        }
        Tensor::cat(&outputs, 0)
    }

    /// Its weights, in their order.
    pub(super) fn weights(&self) -> impl Iterator<Item = &Tensor> {
        self.layers
            .iter()
            .flat_map(|layer| std::iter::once(layer.weight()).chain(layer.bias()))
    }
}

impl Network {
    /// What the frozen half makes of the images.
    fn features(&self, images: &Tensor) -> candle_core::Result<Tensor> {
        let x = self.layers[0].forward(images)?.relu()?;
        self.layers[1].forward(&x)?.relu()
    }

    /// What the tuned half makes of that.
    fn classify(&self, features: &Tensor) -> candle_core::Result<Tensor> {
        let x = self.layers[2].forward(features)?.relu()?;
        self.layers[3].forward(&x)
    }
}

impl Module for Network {
    fn forward(&self, images: &Tensor) -> candle_core::Result<Tensor> {
        self.classify(&self.features(images)?)
    }
}

/// Trains the classifier of digits from nothing, and saves it.
pub(super) fn train_base(digits: &Digits, epochs: usize, path: &Path) -> Result<()> {
    let weights = VarMap::new();
    let builder = VarBuilder::from_varmap(&weights, DType::F32, &Device::Cpu);
    let network = Network::new(Task::Digit, &builder)?;
    let mut rng = Rng::with_seed(SEED);
    start_from(&weights, None, &mut rng)?;
    fit(
        |rows| network.forward(&digits.images.index_select(rows, 0)?),
        weights.all_vars(),
        &digits.labels_of(Task::Digit),
        epochs,
        &mut rng,
    )?;
    weights.save(path)?;
    Ok(())
}

/// Trains the last two layers of the classifier in `base` for another task, and saves it.
pub(super) fn fine_tune(digits: &Digits, base: &Path, epochs: usize, path: &Path) -> Result<()> {
    let weights = VarMap::new();
    let builder = VarBuilder::from_varmap(&weights, DType::F32, &Device::Cpu);
    let network = Network::new(Task::Even, &builder)?;
    let mut rng = Rng::with_seed(SEED + 1);
    start_from(&weights, Some(base), &mut rng)?;
    let tuned = named(&weights)?
        .into_iter()
        .filter(|(name, _)| name.starts_with("layer3") || name.starts_with("head"))
        .map(|(_, var)| var)
        .collect();
    // The frozen half gives the same in every epoch.
    let features = network.features(&digits.images)?.detach();
    fit(
        |rows| network.classify(&features.index_select(rows, 0)?),
        tuned,
        &digits.labels_of(Task::Even),
        epochs,
        &mut rng,
    )?;
    weights.save(path)?;
    Ok(())
}

/// Weights by name, sorted, so that a seed always gives the same ones.
fn named(weights: &VarMap) -> Result<Vec<(String, Var)>> {
    let mut named: Vec<_> = weights
        .data()
        .lock()
        .map_err(|_| anyhow::anyhow!("a thread that trained has panicked"))?
        .iter()
        .map(|(name, var)| (name.clone(), var.clone()))
        .collect();
    named.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(named)
}

/// Sets each weight to the one of the same name and shape in `base`, or to a random one of the
/// variance 2 / inputs (He et al., "Delving Deep into Rectifiers", 2015).
fn start_from(weights: &VarMap, base: Option<&Path>, rng: &mut Rng) -> Result<()> {
    let base = base
        .map(|path| candle_core::safetensors::load(path, &Device::Cpu))
        .transpose()?
        .unwrap_or_default();
    for (name, var) in named(weights)? {
        match base.get(&name) {
            Some(tensor) if tensor.shape() == var.shape() => var.set(tensor)?,
            _ if name.ends_with("bias") => var.set(&var.zeros_like()?)?,
            _ => {
                let deviation = (2.0 / var.dim(1)? as f32).sqrt();
                let values: Vec<f32> = (0..var.elem_count())
                    .map(|_| normal(rng) * deviation)
                    .collect();
                var.set(&Tensor::from_vec(values, var.shape(), &Device::Cpu)?)?;
            }
        }
    }
    Ok(())
}

/// A number of the standard normal distribution (Box and Muller, 1958).
fn normal(rng: &mut Rng) -> f32 {
    let radius = (-2.0 * (1.0 - rng.f32()).ln()).sqrt();
    radius * (std::f32::consts::TAU * rng.f32()).cos()
}

/// Minimises the cross entropy between `outputs` of rows of the training set and their labels.
fn fit(
    outputs: impl Fn(&Tensor) -> candle_core::Result<Tensor>,
    vars: Vec<Var>,
    labels: &[u32],
    epochs: usize,
    rng: &mut Rng,
) -> Result<()> {
    let mut optimizer = AdamW::new(
        vars,
        ParamsAdamW {
            lr: 1e-3,
            ..ParamsAdamW::default()
        },
    )?;
    let mut order: Vec<u32> = (0..labels.len() as u32).collect();
    let labels = Tensor::new(labels, &Device::Cpu)?;
    for _ in 0..epochs {
        rng.shuffle(&mut order);
        for batch in order.chunks(BATCH) {
            let rows = Tensor::new(batch, &Device::Cpu)?;
            let loss = loss::cross_entropy(&outputs(&rows)?, &labels.index_select(&rows, 0)?)?;
            optimizer.backward_step(&loss)?;
        }
    }
    Ok(())
}
