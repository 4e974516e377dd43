//! What can be asked for.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use carlsbad_types::ByteSize;
use clap::{Args, Parser, Subcommand, ValueEnum};
use tetris_store::ViewKind;

/// One copy of every tensor on the machine, whoever loads it.
#[derive(Debug, Parser)]
#[command(
    name = "tetris",
    version,
    arg_required_else_help = true,
    after_help = "A MODEL is a label, an id, or the first digits of an id.\n\n\
        Exit codes: 0 done, 1 failed, 2 bad usage, 3 no such model, 4 not allowed, 5 no room,\n\
        6 nobody there or busy: try again. `attach` ends as its command does.\n\n\
        With --json, sizes are in bytes and times in seconds; what went wrong is an object with\n\
        `error` and `kind` on standard error, where `kind` is failed, bad_usage, no_such_model,\n\
        not_allowed, no_room or unavailable, as the exit code."
)]
pub(crate) struct Options {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Args)]
pub(crate) struct Global {
    /// The store's directory [default: $TETRIS_STORE, or /dev/shm/tetris]
    #[arg(long, global = true, value_name = "DIR", conflicts_with = "agent")]
    pub(crate) store: Option<PathBuf>,

    /// Ask the agent at this socket instead of using the store itself [default: $TETRIS_AGENT unless
    /// --store is given, or no agent]
    #[arg(long, global = true, value_name = "SOCKET")]
    pub(crate) agent: Option<PathBuf>,

    /// Who may share with whom; a store belongs to one domain
    #[arg(long, global = true, value_name = "NAME", default_value = "")]
    pub(crate) domain: String,

    /// Print JSON
    #[arg(long, global = true)]
    pub(crate) json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Bring models into the store: safetensors, ONNX or GGUF files, or folders of them
    Ingest(Ingest),
    /// List the models
    Ls,
    /// Show what a model consists of
    Show(Show),
    /// Run a command that keeps a model in the store for as long as it runs
    Attach(Attach),
    /// Export a model as files that an unmodified runtime loads
    View(View),
    /// Show how much of a model others have as well
    Overlap(Overlap),
    /// Show what the store holds
    Stats,
    /// Free what nobody has used for the keep-alive time
    Reclaim(Reclaim),
    /// Read everything and compare it with its hashes
    Verify(Verify),
    /// Let a model go by a label
    Label(Label),
    /// Take a label away; the model goes when nobody uses it any more
    Rm(Rm),
    /// Place functions on machines so that they share the most
    Plan(Plan),
    /// Run the agent: it fills, hands out and reclaims for others
    Serve(Serve),
}

#[derive(Debug, Args)]
pub(crate) struct Ingest {
    /// Model files, or folders
    #[arg(required = true, value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,

    /// A label for the model to go by
    #[arg(long)]
    pub(crate) label: Option<String>,

    /// The most that the store may hold
    #[arg(long, value_name = "SIZE")]
    pub(crate) quota: Option<ByteSize>,
}

#[derive(Debug, Args)]
pub(crate) struct Show {
    /// The model
    pub(crate) model: String,
}

#[derive(Debug, Args)]
pub(crate) struct Attach {
    /// The model; for the command its id is in $TETRIS_MODEL, the store, where it is mounted here,
    /// in $TETRIS_STORE, and the agent, where one was asked, in $TETRIS_AGENT
    pub(crate) model: String,

    /// The command and its arguments
    #[arg(required = true, last = true, value_name = "COMMAND")]
    pub(crate) command: Vec<OsString>,
}

#[derive(Debug, Args)]
pub(crate) struct View {
    /// The model
    pub(crate) model: String,

    /// For whom the view is
    pub(crate) kind: Kind,

    /// The new folder, in the store's mount; with an agent, the view's name
    pub(crate) folder: PathBuf,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Kind {
    /// A Hugging Face folder of safetensors shards, for torch
    HfSharded,
    /// model.onnx with external data, for ONNX Runtime
    OnnxExternal,
}

impl From<Kind> for ViewKind {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::HfSharded => Self::HfSharded,
            Kind::OnnxExternal => Self::OnnxExternal,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct Overlap {
    /// The model
    pub(crate) model: String,

    /// The others
    #[arg(required = true)]
    pub(crate) others: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Reclaim {
    /// How long a model stays after its last use, such as 0s, 90s, 15m or 1h
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "1m")]
    pub(crate) keep_alive: Duration,
}

#[derive(Debug, Args)]
pub(crate) struct Verify {
    /// Take damaged files and models out of the store, so that they can be ingested anew
    #[arg(long)]
    pub(crate) discard: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Label {
    /// The label
    pub(crate) label: String,

    /// The model
    pub(crate) model: String,
}

#[derive(Debug, Args)]
pub(crate) struct Rm {
    /// The label
    pub(crate) label: String,
}

#[derive(Debug, Args)]
#[command(after_help = "\
FILE holds {\"nodes\": [{\"name\", \"cpus\", \"gpus\", \"memory\"}], \"functions\": [{\"name\",\n\
\"model\" or \"tensors\": [[id, bytes]], \"profile\": [{\"cpus\", \"gpu_share\", \"memory\", \"batch\",\n\
\"concurrency\", \"latency_s\"}], \"slo_s\", \"rps\"}]}. Sizes are in bytes.")]
pub(crate) struct Plan {
    /// Machines and functions as JSON; `-` reads standard input
    pub(crate) file: PathBuf,

    /// How an instance finds its machine
    #[arg(long, value_enum, default_value = "union")]
    pub(crate) placement: PlacementKind,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum PlacementKind {
    /// Bytes of the union of what the machine holds
    Union,
    /// Largest overlap with any one function there, as in the paper
    Pairwise,
}

#[derive(Debug, Args)]
pub(crate) struct Serve {
    /// Where to make the socket; everybody may connect [default: $TETRIS_AGENT, or the store's
    /// directory with .socket behind it]
    #[arg(long, value_name = "SOCKET")]
    pub(crate) socket: Option<PathBuf>,

    /// How long a model stays after its last use, such as 90s, 15m or 1h
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "1m")]
    pub(crate) keep_alive: Duration,

    /// The most that the store may hold
    #[arg(long, value_name = "SIZE")]
    pub(crate) quota: Option<ByteSize>,

    /// The most that one user may bring
    #[arg(long, value_name = "SIZE")]
    pub(crate) quota_per_user: Option<ByteSize>,

    /// Serve only these users, besides root and the agent's own [default: everybody]
    #[arg(long = "allow-user", value_name = "UID")]
    pub(crate) users: Vec<u32>,

    /// Serve only users of these primary groups
    #[arg(long = "allow-group", value_name = "GID")]
    pub(crate) groups: Vec<u32>,

    /// How often to sweep
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "500ms")]
    pub(crate) sweep_every: Duration,
}

/// A time as people write it: a number and one of ms, s, m, h, d.
fn duration(text: &str) -> Result<Duration, String> {
    let split = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let seconds = match unit {
        "ms" => 1e-3,
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3_600.0,
        "d" => 86_400.0,
        _ => return Err("a time is a number and one of ms, s, m, h, d".to_owned()),
    };
    let number: f64 = number.parse().map_err(|_| "not a number".to_owned())?;
    Duration::try_from_secs_f64(number * seconds).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Options::command().debug_assert();
    }

    #[test]
    fn times_read_as_people_write_them() {
        assert_eq!(duration("1.5m"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        for bad in [
            "",
            "5",
            "m",
            "-1s",
            "1 s",
            "1e400s",
            "9999999999999999999999d",
        ] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }
}
