//! Takes models into a store and shows them to runtimes that know nothing of it.
//!
//! ```text
//! cargo run --release -p tetris-store --example export_views -- /dev/shm/tetris MODEL...
//! ```
//!
//! Each model gets a view in `<root>/views/<label>`: `model.onnx` with external data where it came
//! as ONNX, a Hugging Face folder otherwise. One line of JSON a model goes to standard output.

use std::error::Error;
use std::path::{Path, PathBuf};

use tetris_store::{SourceFormat, Store, StoreConfig, ViewKind, open_model};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let root = arguments
        .next()
        .ok_or("usage: export_views ROOT MODEL...")?;
    let store = Store::open(StoreConfig::at(root))?;
    for model in arguments {
        export(&store, &model)?;
    }
    Ok(())
}

fn export(store: &Store, model: &Path) -> Result<(), Box<dyn Error>> {
    let source = open_model(model)?;
    let ingested = store.ingest(&*source)?;
    let kind = match source.format() {
        SourceFormat::Onnx => ViewKind::OnnxExternal,
        _ => ViewKind::HfSharded,
    };
    let name = model.file_stem().ok_or("a model without a name")?;
    let view = store.export_view(
        &ingested.model,
        kind,
        &store.root().join("views").join(name),
    )?;
    let line = serde_json::json!({
        "model": ingested.model.to_string(),
        "bytes": ingested.bytes,
        "written": ingested.written,
        "view": view.path,
        "kind": view.kind.name(),
        "linked": view.linked,
        "copied": view.copied,
    });
    #[allow(clippy::print_stdout, reason = "it is what the example is for")]
    {
        println!("{line}");
    }
    Ok(())
}
