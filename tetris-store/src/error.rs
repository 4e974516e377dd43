use std::io;
use std::path::PathBuf;

use carlsbad_types::Shape;

/// `std::result::Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, on what, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A text that should be an id is none.
    #[error("`{text}` is not a {what}: expected 64 hexadecimal digits")]
    BadId {
        /// Which kind of id was expected.
        what: &'static str,
        /// The text, cut to 80 characters.
        text: String,
    },

    /// A tensor's shape and element type do not make a size.
    #[error("a tensor of {element} {shape} has no size: {why}")]
    BadShape {
        /// The element type's name.
        element: &'static str,
        /// The shape.
        shape: Shape,
        /// What is wrong with the pair.
        why: &'static str,
    },

    /// A model file is not what its format asks for. Nothing of it was stored.
    #[error("{}: not a valid {format} file: {why}", path.display())]
    BadModel {
        /// The file.
        path: PathBuf,
        /// `safetensors`, `ONNX` or `GGUF`.
        format: &'static str,
        /// The first thing that is wrong.
        why: String,
    },

    /// A model names a file outside of its folder. Nothing of it was opened.
    #[error("{}: the model names `{location}`, which is not in its folder: {why}", folder.display())]
    OutsideModel {
        /// The model's folder.
        folder: PathBuf,
        /// The name, cut to 200 characters.
        location: String,
        /// Which rule it breaks.
        why: &'static str,
    },

    /// There is no model there.
    #[error("{} is not a model: {why}", path.display())]
    NotAModel {
        /// What was opened.
        path: PathBuf,
        /// Why it is none.
        why: &'static str,
    },

    /// Something that should be a file is none.
    #[error("{} is {kind}, not a file: copy the model into a file first", path.display())]
    NotAFile {
        /// Where it is.
        path: PathBuf,
        /// What it is instead.
        kind: &'static str,
    },

    /// The operating system refused a step.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was tried, as a verb.
        what: &'static str,
        /// On which file or directory.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

impl Error {
    /// For `map_err`: an [`Error::Io`] that says what was tried on what.
    pub(crate) fn io(
        what: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { what, path, source }
    }
}
