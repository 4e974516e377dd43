//! candle's own BertModel with the real weights, loaded in candle's way and in ours.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each bench target uses some of it"
)]

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::bert::{BertModel, Config};
use carlsbad_kit::capability::data_dir;
use tetris_store::candle::SharedTensors;
use tetris_store::{ModelId, Store, open_model};

/// The folder of the sentence encoder that `cargo xtask data` fetches: 90.9 MB, 104 tensors.
pub fn folder() -> PathBuf {
    data_dir().join("minilm-gt")
}

pub fn weights() -> PathBuf {
    folder().join("model.safetensors")
}

pub fn config() -> Config {
    let text = fs::read(folder().join("config.json")).unwrap();
    serde_json::from_slice(&text).unwrap()
}

pub fn ingest(store: &Store) -> ModelId {
    let source = open_model(&weights()).unwrap();
    store.ingest(&*source).unwrap().model
}

/// candle's documented way: `VarBuilder::from_mmaped_safetensors`.
pub fn load_candle(path: &Path, config: &Config) -> BertModel {
    // SAFETY: nobody writes to the cached model.
    let builder =
        unsafe { VarBuilder::from_mmaped_safetensors(&[path], DType::F32, &Device::Cpu) }.unwrap();
    BertModel::load(builder, config).unwrap()
}

/// Ours: attach, and hand candle a `VarBuilder`.
pub fn load_shared(store: &Store, model: &ModelId, config: &Config) -> (BertModel, SharedTensors) {
    let tensors = SharedTensors::of(&store.attach(model).unwrap()).unwrap();
    let bert = BertModel::load(tensors.var_builder(DType::F32), config).unwrap();
    assert_eq!(tensors.report().copied, [], "all of it is shared");
    (bert, tensors)
}

/// "How many people live in Berlin?", as the model's tokenizer encodes it.
pub const QUESTION: [u32; 9] = [101, 2129, 2116, 2111, 2444, 1999, 4068, 1029, 102];

/// The hidden states of a batch of one.
pub fn infer(bert: &BertModel, ids: &[u32]) -> Result<Tensor> {
    let ids = Tensor::new(ids, &Device::Cpu)?.unsqueeze(0)?;
    bert.forward(&ids, &ids.zeros_like()?, None)
}

pub fn bits(tensor: &Tensor) -> Vec<u8> {
    let mut bytes = Vec::new();
    tensor.write_bytes(&mut bytes).unwrap();
    bytes
}

/// A text of `len` tokens that are all different.
pub fn text(len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| 1996 + 7 * i).collect()
}

/// Names of the model's tensors.
pub fn names() -> Vec<String> {
    let source = open_model(&weights()).unwrap();
    source
        .tensors()
        .iter()
        .map(|tensor| tensor.name.clone())
        .collect()
}
