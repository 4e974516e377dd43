//! candle's own BertModel, unmodified: on shared weights it answers bit by bit as on its own.
#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod common;

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use candle_nn::{VarBuilder, VarMap};
use candle_transformers::models::bert::{BertModel, Config};
use carlsbad_kit::capability::{Capability, data_dir};
use carlsbad_kit::leak::LeakGuard;
use common::store;
use tetris_store::candle::{MapAlloc, SharedTensors};
use tetris_store::open_model;

#[global_allocator]
static ALLOCATOR: MapAlloc = MapAlloc::system();

fn answers(model: &BertModel, len: u32) -> Vec<u8> {
    let ids: Vec<u32> = (0..2 * len).map(|i| (i * 37) % 97).collect();
    let ids = Tensor::from_vec(ids, (2, len as usize), &Device::Cpu).unwrap();
    let hidden = model
        .forward(&ids, &ids.zeros_like().unwrap(), None)
        .unwrap();
    let mut bytes = Vec::new();
    hidden.write_bytes(&mut bytes).unwrap();
    bytes
}

fn compare(path: &Path, config: &Config) {
    let (dir, store) = store();
    let id = store.ingest(&*open_model(path).unwrap()).unwrap().model;
    // SAFETY: nobody writes to the file.
    let builder = unsafe { VarBuilder::from_mmaped_safetensors(&[path], DType::F32, &Device::Cpu) };
    let theirs = BertModel::load(builder.unwrap(), config).unwrap();
    let leaks = LeakGuard::beneath(dir.path());
    let tensors = SharedTensors::of(&store.attach(&id).unwrap()).unwrap();
    let ours = BertModel::load(tensors.var_builder(DType::F32), config).unwrap();
    assert_eq!(tensors.report().copied, []);
    drop(tensors);
    for len in [1, 9, 33] {
        assert!(answers(&ours, len) == answers(&theirs, len), "{len} tokens");
    }
    drop(ours);
    leaks.check();
}

#[test]
fn a_small_bert_answers_as_with_candles_loader() {
    let config = Config {
        vocab_size: 100,
        hidden_size: 48,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        intermediate_size: 96,
        max_position_embeddings: 64,
        ..Config::default()
    };
    let variables = VarMap::new();
    let builder = VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu);
    BertModel::load(builder, &config).unwrap();
    let dir = common::scratch();
    let path = dir.path().join("model.safetensors");
    let tensors: HashMap<_, _> = (variables.data().lock().unwrap().iter())
        .map(|(name, variable)| (name.clone(), variable.as_tensor().clone()))
        .collect();
    candle_core::safetensors::save(&tensors, &path).unwrap();
    compare(&path, &config);
}

#[test]
fn the_sentence_encoder_answers_as_with_candles_loader() {
    carlsbad_kit::require!(Capability::Data);
    let folder = data_dir().join("minilm-gt");
    let config = serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap());
    compare(&folder.join("model.safetensors"), &config.unwrap());
}
