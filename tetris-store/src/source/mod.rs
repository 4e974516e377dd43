//! Model files as a list of tensors that can be read piece by piece.

use std::fs::File;
use std::path::{Path, PathBuf};

use carlsbad_types::Shape;

use crate::element::ElementType;
use crate::error::{Error, Result};
use crate::manifest::{Sidecar, SourceFormat};

pub(crate) mod file;
mod gguf;
pub(crate) mod onnx;
pub(crate) mod onnx_proto;
pub(crate) mod safetensors;
pub(crate) mod wire;

use file::ModelFile;
#[cfg(feature = "daemon")]
use file::ModelFolder;
pub use gguf::GgufSource;
pub(crate) use gguf::HEADER;
pub(crate) use onnx::GRAPH;
pub use onnx::OnnxSource;
pub use safetensors::SafetensorsSource;
pub(crate) use safetensors::{INDEX, METADATA};

/// Most tensors a model may have. The largest models published have around 100,000.
const MAX_TENSORS: usize = 1 << 20;
/// Longest name of a tensor, in bytes.
const MAX_NAME: usize = 4096;

/// A tensor that a model file declares. A source has checked it: `len` is the size that element
/// type and shape ask for, and the file holds that many bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceTensor {
    /// Its name, unique in the model.
    pub name: String,
    /// Its element type.
    pub element: ElementType,
    /// Its extents.
    pub shape: Shape,
    /// Its size in bytes.
    pub len: u64,
}

/// A model as it comes: tensors to be read, and small files to be kept.
///
/// Bytes are read by position into the caller's memory and never mapped: somebody may write to the
/// file, or cut it short, while it is read.
pub trait ModelSource: Send + Sync {
    /// The format it comes in.
    fn format(&self) -> SourceFormat;

    /// Its tensors, in the order in which reading them is cheapest.
    fn tensors(&self) -> &[SourceTensor];

    /// Fills `into` with the bytes of tensor `index` from byte `offset` of the tensor on.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io), also where the file has become shorter meanwhile.
    fn read_at(&self, index: usize, offset: u64, into: &mut [u8]) -> Result<()>;

    /// Its small files.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io) where one cannot be read.
    fn sidecars(&self) -> Result<Vec<Sidecar>>;
}

/// Opens the model at `path`, whatever its name: a safetensors, ONNX or GGUF file is told by its
/// content. In a folder, a safetensors model comes first; else there must be just one `.onnx` or
/// `.gguf` file.
///
/// # Errors
/// [`Error::NotAModel`] for a file of no known format; else what the format's own `open` says.
pub fn open_model(path: &Path) -> Result<Box<dyn ModelSource>> {
    if !path.is_dir() {
        return open_model_file(ModelFile::open(path)?, true);
    }
    match main_of_folder(path)? {
        None => Ok(Box::new(SafetensorsSource::open(path)?)),
        Some(model) => open_model_file(ModelFile::open(&model)?, true),
    }
}

/// The one model file in a folder; `None` where the folder as a whole is a safetensors model.
fn main_of_folder(path: &Path) -> Result<Option<PathBuf>> {
    if path.join(safetensors::INDEX).exists() || path.join("model.safetensors").exists() {
        return Ok(None);
    }
    let mut models: Vec<PathBuf> = Vec::new();
    for entry in std::fs::read_dir(path).map_err(Error::io("list", path))? {
        let file = entry.map_err(Error::io("list", path))?.path();
        let extension = file.extension().and_then(|extension| extension.to_str());
        if matches!(extension, Some("safetensors" | "onnx" | "gguf")) {
            models.push(file);
        }
    }
    match models.as_slice() {
        [model] => Ok(Some(model.clone())),
        [] => Err(Error::NotAModel {
            path: path.to_owned(),
            why: "the folder has no .safetensors, .onnx or .gguf file",
        }),
        _ => Err(Error::NotAModel {
            path: path.to_owned(),
            why: "the folder has several models and no model.safetensors.index.json: name one",
        }),
    }
}

/// Opens the model in an open file, such as one that another process passed on. `path` is for
/// messages; an ONNX model's external data is not looked for.
///
/// # Errors
/// As [`open_model`].
pub fn open_model_from(file: File, path: &Path) -> Result<Box<dyn ModelSource>> {
    open_model_file(ModelFile::from_file(file, path)?, false)
}

/// Opens the model that the open `files` make up, by the names its files know each other by: the
/// one called `main`, or the folder. `path` is for messages; no other file is opened.
///
/// # Errors
/// As [`open_model`].
#[cfg(feature = "daemon")]
pub(crate) fn open_model_of(
    files: Vec<(String, File)>,
    main: Option<&str>,
    path: &Path,
) -> Result<Box<dyn ModelSource>> {
    let folder = ModelFolder::of_files(files, path);
    let Some(main) = main else {
        return Ok(Box::new(SafetensorsSource::open_folder(folder)?));
    };
    let file = folder.file(main)?;
    if is_onnx(&file)? {
        return Ok(Box::new(OnnxSource::in_folder(file, folder)?));
    }
    open_model_file(file, false)
}

/// Open files by their names in a model's folder, and which of them is the model, unless the
/// folder is.
#[cfg(feature = "daemon")]
pub(crate) type PassedFiles = (Vec<(String, File)>, Option<String>);

/// The files that the model at `path` needs, opened: what [`open_model_of`] wants.
///
/// # Errors
/// As [`open_model`].
#[cfg(feature = "daemon")]
pub(crate) fn files_of_model(path: &Path) -> Result<PassedFiles> {
    if path.is_dir() {
        return match main_of_folder(path)? {
            None => SafetensorsSource::open(path)?.passed(),
            Some(main) => files_of_model(&main),
        };
    }
    let file = ModelFile::open(path)?;
    if is_onnx(&file)? {
        return OnnxSource::from_model_file(file, true)?.passed();
    }
    let passed = file.passed(path.parent())?;
    // Whatever is wrong with it is said here, where its user is.
    open_model_file(file, false)?;
    let main = passed.0.clone();
    Ok((vec![passed], Some(main)))
}

#[cfg(feature = "daemon")]
fn is_onnx(file: &ModelFile) -> Result<bool> {
    let mut start = [0; 9];
    let held = start.len().min(file.len() as usize);
    file.read_exact_at(0, &mut start[..held])?;
    let safetensors = held == 9 && start[4..8] == [0; 4] && start[8] == b'{';
    Ok(held > 0
        && !start.starts_with(gguf::MAGIC)
        && !safetensors
        && onnx_proto::may_begin(start[0]))
}

fn open_model_file(file: ModelFile, named: bool) -> Result<Box<dyn ModelSource>> {
    let mut start = [0; 9];
    let held = start.len().min(file.len() as usize);
    file.read_exact_at(0, &mut start[..held])?;
    if start.starts_with(gguf::MAGIC) {
        return Ok(Box::new(GgufSource::from_model_file(file)?));
    }
    // A header is at most 100 MB, so the upper four bytes of its length are zero; it opens with `{`.
    if held == 9 && start[4..8] == [0; 4] && start[8] == b'{' {
        return Ok(Box::new(SafetensorsSource::from_model_file(file)?));
    }
    // An ONNX model is a protobuf message, which has no magic number: its first field has a number
    // of ModelProto's and a wire type that goes with it.
    if held > 0 && onnx_proto::may_begin(start[0]) {
        return Ok(Box::new(OnnxSource::from_model_file(file, named)?));
    }
    Err(Error::NotAModel {
        path: file.path().to_owned(),
        why: "its first bytes are those of no safetensors, ONNX or GGUF file",
    })
}

/// What is wrong with a tensor's name, if anything.
fn check_name(name: &str) -> std::result::Result<(), String> {
    if name.is_empty() {
        Err("a tensor without a name".to_owned())
    } else if name.len() > MAX_NAME {
        Err(format!(
            "a tensor's name of {} bytes is over the limit of {MAX_NAME}",
            name.len()
        ))
    } else if name.contains('\0') {
        Err(format!("the tensor name {name:?} contains a NUL"))
    } else {
        Ok(())
    }
}

/// Nothing but a tensor's own bytes is ever read as its bytes.
fn check_read(
    tensors: &[SourceTensor],
    index: usize,
    offset: u64,
    into: &[u8],
    path: &Path,
) -> Result<()> {
    let end = offset.checked_add(into.len() as u64);
    match (tensors.get(index), end) {
        (Some(tensor), Some(end)) if end <= tensor.len => Ok(()),
        _ => Err(Error::Io {
            what: "read beyond a tensor's end in",
            path: path.to_owned(),
            source: std::io::ErrorKind::InvalidInput.into(),
        }),
    }
}
