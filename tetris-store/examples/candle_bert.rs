//! candle's own BertModel on the store's pages: run it twice, or side by side.
//!
//! `cargo run --release -p tetris-store --features candle-models --example candle_bert -- FOLDER`
//!
//! FOLDER has `model.safetensors` and `config.json` of a BERT, as Hugging Face publishes them;
//! `cargo xtask data` fetches two.
#![allow(clippy::print_stdout, reason = "this is a program")]

use std::path::Path;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use candle_transformers::models::bert::BertModel;
use tetris_store::candle::{MapAlloc, SharedTensors};
use tetris_store::{Store, StoreConfig, open_model};

// All it takes of a program: without this line everything works and is copied.
#[global_allocator]
static ALLOCATOR: MapAlloc = MapAlloc::system();

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = std::env::args().nth(1).ok_or("which folder?")?;
    let folder = Path::new(&folder);
    let config = serde_json::from_slice(&std::fs::read(folder.join("config.json"))?)?;

    // The first process reads the model; to all others it is there.
    let store = Store::open(StoreConfig::at("/dev/shm/tetris-example"))?;
    let start = Instant::now();
    let ingested = store.ingest(&*open_model(&folder.join("model.safetensors"))?)?;
    println!(
        "ingest: {:?}, {} written",
        start.elapsed(),
        ingested.written
    );

    let start = Instant::now();
    let tensors = SharedTensors::of(&store.attach(&ingested.model)?)?;
    println!("attach: {:?}, {}", start.elapsed(), tensors.report());

    let start = Instant::now();
    let bert = BertModel::load(tensors.var_builder(DType::F32), &config)?;
    // "How many people live in Berlin?" in the tokens of an uncased BERT.
    let ids = [101u32, 2129, 2116, 2111, 2444, 1999, 4068, 1029, 102];
    let ids = Tensor::new(&ids, &Device::Cpu)?.unsqueeze(0)?;
    let hidden = bert.forward(&ids, &ids.zeros_like()?, None)?;
    println!("load and first inference: {:?}", start.elapsed());
    println!(
        "mean of the hidden states: {}",
        hidden.mean_all()?.to_scalar::<f32>()?
    );
    Ok(())
}
