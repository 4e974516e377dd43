use std::io;
use std::path::PathBuf;
use std::time::Duration;

use carlsbad_types::{ByteSize, Shape};

use crate::id::ModelId;
use crate::schedule::Infeasible;

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

    /// Bytes that should be a manifest are none.
    #[error("not a model's manifest: {why}")]
    BadManifest {
        /// The first thing that is wrong.
        why: String,
    },

    /// The directory is not a store this version can use.
    #[error("{}: not a store for this configuration: {why}", path.display())]
    NotAStore {
        /// The store's root.
        path: PathBuf,
        /// What is different.
        why: String,
    },

    /// No model goes by this id, id prefix or label.
    #[error("no model `{name}` in the store: ingest it first, or list the models it has")]
    UnknownModel {
        /// What was asked for.
        name: String,
    },

    /// An id prefix fits several models.
    #[error("`{prefix}` fits {count} models: give more digits")]
    AmbiguousModel {
        /// The prefix.
        prefix: String,
        /// How many models it fits.
        count: usize,
    },

    /// The model has no tensor of this name.
    #[error("model {model:.12} has no tensor `{name}`")]
    UnknownTensor {
        /// The model.
        model: ModelId,
        /// The name that was asked for.
        name: String,
    },

    /// A label that cannot be used.
    #[error(
        "`{label}` is no label: use 1 to 128 of A-Z a-z 0-9 . _ - + @ and do not begin with a dot"
    )]
    BadLabel {
        /// The label, cut to 128 characters.
        label: String,
    },

    /// A stored file is missing or not what its name says.
    #[error("{} is damaged: {why}; `tetris verify --discard`, or `Store::discard`, takes it out, and the next ingest stores it anew", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },

    /// The store may not grow by that much.
    #[error(
        "{need} more would exceed the quota: {used} of {quota} are in use; raise the quota, or reclaim"
    )]
    QuotaExceeded {
        /// What was to be added.
        need: ByteSize,
        /// What is stored or reserved.
        used: ByteSize,
        /// The most there may be.
        quota: ByteSize,
    },

    /// The file system is full, or the process may not write files of that size.
    #[error("no space to {what} {}: {why}", path.display())]
    NoSpace {
        /// What was tried, as a verb.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Which limit was met.
        why: String,
    },

    /// The store can be read but not written to by this process.
    #[error("{}: this process may only read the store: let the agent or the store's owner do it", path.display())]
    ReadOnly {
        /// The store's root.
        path: PathBuf,
    },

    /// Somebody held a lock for longer than the caller was ready to wait.
    #[error("{}: still {what} after {waited:?}", path.display())]
    Busy {
        /// What the holder is taken to be doing.
        what: &'static str,
        /// What is locked.
        path: PathBuf,
        /// How long was waited.
        waited: Duration,
    },

    /// A row of a profile table has a value that cannot be. Nothing was decided by it.
    #[error("profile row {row}: {why}")]
    BadProfile {
        /// Which row, from 0 on.
        row: usize,
        /// What is wrong with it.
        why: &'static str,
    },

    /// No profiled configuration answers in time.
    #[error(
        "no profiled configuration answers within {slo:?}: ask for at least {least:?}, or profile smaller batches or more CPUs"
    )]
    SloUnreachable {
        /// What was asked for.
        slo: Duration,
        /// The shortest that can be kept.
        least: Duration,
    },

    /// The instance has as many requests waiting as it may.
    #[error("{limit} requests are waiting already: try another instance, or later")]
    Overloaded {
        /// How many may wait.
        limit: usize,
    },

    /// An answer did not come in time.
    #[error("no answer in time, after {waited:?}: add instances, or ask for a longer SLO")]
    DeadlineExceeded {
        /// How long was waited.
        waited: Duration,
    },

    /// The inference closure panicked on the batch that the request was in.
    #[error("inference panicked: {message}; the instance goes on")]
    InferencePanicked {
        /// The panic's message.
        message: String,
    },

    /// The inference closure did not answer each request once.
    #[error(
        "inference returned {returned} answers to a batch of {given}: it must return one for each"
    )]
    WrongBatch {
        /// Requests in the batch.
        given: usize,
        /// Answers returned.
        returned: usize,
    },

    /// The instance ended before it answered.
    #[error("the instance ended before it answered: ask another one")]
    InstanceClosed,

    /// The input of a placement has a value that cannot be.
    #[error("cannot place {what}: {why}")]
    BadPlacement {
        /// Which function or machine.
        what: String,
        /// What is wrong with it.
        why: &'static str,
    },

    /// The load cannot be served by these machines.
    #[error("no placement: {0}")]
    Infeasible(#[from] Infeasible),

    /// A model does not go into this kind of view.
    #[error("model {model:.12} has no {kind} view: {why}")]
    ViewUnsupported {
        /// The model.
        model: ModelId,
        /// The kind of view.
        kind: &'static str,
        /// What stands against it.
        why: String,
    },

    /// A view consists of hard links, which do not cross from one mount to another.
    #[error(
        "{} is not in the mount of the store {}: choose a folder there, such as {}",
        dir.display(), root.display(), root.join("views/NAME").display()
    )]
    ViewElsewhere {
        /// Where the view was to be.
        dir: PathBuf,
        /// The store's root.
        root: PathBuf,
    },

    /// The kernel lets a user hard-link only files of his own (`fs.protected_hardlinks`).
    #[error("{} belongs to another user, so it cannot be linked: let the agent or the store's owner export the view", path.display())]
    ViewDenied {
        /// The stored file.
        path: PathBuf,
    },

    /// Where a view was to be there is something already.
    #[error("{} exists already: remove it, or choose another folder", dir.display())]
    ViewExists {
        /// Where the view was to be.
        dir: PathBuf,
    },

    /// Another agent serves this already.
    #[error("{} is locked: an agent runs already; stop it first", path.display())]
    AgentRunning {
        /// The lock it holds.
        path: PathBuf,
    },

    /// The agent cannot be reached, or has hung up.
    #[error("no agent at {}: {why}", socket.display())]
    NoAgent {
        /// Its socket.
        socket: PathBuf,
        /// What came instead of an answer.
        why: String,
    },

    /// The agent understood, and refused.
    #[cfg(feature = "daemon")]
    #[error("{message}")]
    AgentRefused {
        /// Which kind of refusal it is.
        kind: crate::agent::Refusal,
        /// Why.
        message: String,
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
    /// For `map_err`: an error that says what was tried on what. A full file system and one that
    /// is mounted read-only get errors of their own.
    pub(crate) fn io<E: Into<io::Error>>(
        what: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(E) -> Self {
        let path = path.into();
        move |source| {
            let source = source.into();
            match source.kind() {
                io::ErrorKind::StorageFull
                | io::ErrorKind::QuotaExceeded
                | io::ErrorKind::FileTooLarge => {
                    let why = source.to_string();
                    Self::NoSpace { what, path, why }
                }
                io::ErrorKind::ReadOnlyFilesystem => Self::ReadOnly { path },
                _ => Self::Io { what, path, source },
            }
        }
    }
}
