//! A process that serves one model: what a serverless platform starts many of.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Storage, Tensor};
use candle_nn::{Module, VarBuilder};
use carlsbad_kit::child;
use serde::{Deserialize, Serialize};
use tetris_store::candle::SharedTensors;
use tetris_store::{ModelId, Store, StoreConfig};

use super::digits::{Digits, Network, Task};

pub(super) const ROLE: &str = "tetris-store worker";

/// What a worker is to do.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Order {
    pub(super) task: Task,
    pub(super) weights: Weights,
}

/// Where it has its weights from.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum Weights {
    /// A model of the store in this directory.
    Shared { root: PathBuf, model: String },
    /// A file, loaded as candle loads files.
    Private { file: PathBuf },
}

/// What it reports.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Report {
    /// From the beginning of the load to the end of the first inference, in milliseconds.
    pub(super) ready_ms: f64,
    /// Hash of all outputs, bit by bit.
    pub(super) outputs: String,
    /// Hash of all weights, by name.
    pub(super) weights: String,
    /// The share of held-out digits that it got right.
    pub(super) accuracy: f64,
    /// Bytes of weights that had to be copied.
    pub(super) copied: u64,
}

/// Plays the worker, if this process was started as one.
pub(crate) fn play() -> Option<Result<()>> {
    child::arguments::<Order>(ROLE).map(|order| serve(&order))
}

fn serve(order: &Order) -> Result<()> {
    let (_, test) = Digits::load()?;
    // Threads, buffers and activations of an inference are not the model's memory: they are there
    // before it is measured.
    let stand_in = Network::new(order.task, &VarBuilder::zeros(DType::F32, &Device::Cpu))?;
    stand_in.answer(&test)?;
    drop(stand_in);
    child::tell("waiting");
    child::wait_for_parent().context("nobody wants the model")?;

    let start = Instant::now();
    let mut copied = 0;
    let mut tensors = None;
    let weights = match &order.weights {
        Weights::Shared { root, model } => {
            let store = Store::open(StoreConfig::at(root))?;
            let model: ModelId = model.parse()?;
            let shared = SharedTensors::of(&store.attach(&model)?)?;
            let weights = shared.var_builder(DType::F32);
            copied = shared.report().copied_bytes().get();
            tensors = Some(shared);
            weights
        }
        // SAFETY: the file is the tour's own, and nobody writes to it while workers run.
        Weights::Private { file } => unsafe {
            VarBuilder::from_mmaped_safetensors(&[file], DType::F32, &Device::Cpu)?
        },
    };
    let network = Network::new(order.task, &weights)?;
    network.forward(&test.images.narrow(0, 0, 1)?)?;
    let ready_ms = start.elapsed().as_secs_f64() * 1e3;
    drop(weights);

    let outputs = network.answer(&test)?;
    let report = Report {
        ready_ms,
        outputs: hash([&outputs])?,
        weights: hash(network.weights())?,
        accuracy: test.accuracy(order.task, &outputs)?,
        copied,
    };
    drop(outputs);
    child::tell(serde_json::to_string(&report)?);
    child::wait_for_parent();
    drop((network, tensors));
    Ok(())
}

/// A hash of the tensors' shapes and values, bit by bit. Not against an adversary.
pub(super) fn hash<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> Result<String> {
    let mut hasher = DefaultHasher::new();
    for tensor in tensors {
        tensor.dims().hash(&mut hasher);
        let (storage, layout) = tensor.storage_and_layout();
        let Storage::Cpu(storage) = &*storage else {
            bail!("a tensor is not in this machine's memory");
        };
        // In place: a copy of every weight would be memory of this process.
        let values = storage.as_slice::<f32>()?;
        let (from, to) = layout.contiguous_offsets().context("a tensor with gaps")?;
        for value in &values[from..to] {
            value.to_bits().hash(&mut hasher);
        }
    }
    Ok(format!("{:016x}", hasher.finish()))
}
