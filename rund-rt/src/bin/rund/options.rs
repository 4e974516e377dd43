//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use carlsbad_types::ByteSize;
use clap::{Args, Parser, Subcommand, ValueEnum};
use rund_rt::SnapshotPoint;

/// Sandboxes with an address space of their own, cloned from a template.
#[derive(Debug, Parser)]
#[command(
    name = "rund",
    version,
    max_term_width = 100,
    after_help = "Exit codes: 2 for a command line that makes no sense; the program's own; 128 and the signal that ended it; 124 where its \
                  time was over;\n121 where the backend cannot work here; 122 for a program or \
                  template that cannot be used;\n123 for settings that cannot be; 125 for \
                  everything else that failed."
)]
pub(crate) struct Options {
    /// Print JSON for machines: sizes in bytes, times in seconds.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a static program in a sandbox.
    Run(Run),
    /// Make templates.
    #[command(subcommand)]
    Template(TemplateCommand),
    /// Say what isolation this machine gives, and why.
    Probe,
    /// Start many sandboxes at once, check what each says, and draw how long they took.
    Storm(Storm),
    /// List the processes of sandboxes.
    Ps,
    /// Say how much memory the processes of sandboxes hold.
    Stats,
}

/// A program and what it sees.
#[derive(Debug, Args)]
pub(crate) struct Guest {
    /// The directory that the sandbox sees as `/`, read-only; what it writes is kept apart. A PROGRAM
    /// that begins with `/` is named by its path in it.
    #[arg(long, value_name = "DIRECTORY")]
    pub(crate) root: Option<PathBuf>,
    /// Memory of the guest.
    #[arg(long, default_value = "64MiB", value_name = "SIZE")]
    pub(crate) memory: ByteSize,
    /// A variable of the environment, as NAME=VALUE.
    #[arg(long, value_name = "VARIABLE", value_parser = variable)]
    pub(crate) env: Vec<OsString>,
    /// The working directory inside.
    #[arg(long, default_value = "/", value_name = "DIRECTORY")]
    pub(crate) cwd: PathBuf,
    /// What holds the sandbox.
    #[arg(long, value_enum, default_value_t = Engine::KvmElf)]
    pub(crate) backend: Engine,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Engine {
    /// A virtual machine without a kernel in it.
    KvmElf,
    /// A confined process of the host's kernel: no virtual machine.
    Process,
}

/// What a sandbox may use.
#[derive(Debug, Args)]
pub(crate) struct Most {
    /// Processors, in units of one: 0.5 is half of one. Needs control groups.
    #[arg(long, value_name = "NUMBER")]
    pub(crate) cpus: Option<f64>,
    /// Memory that it may dirty. Needs control groups.
    #[arg(long, value_name = "SIZE")]
    pub(crate) max_memory: Option<ByteSize>,
    /// Processes. Needs control groups.
    #[arg(long, value_name = "NUMBER")]
    pub(crate) max_processes: Option<u32>,
    /// Bytes in its writable layer.
    #[arg(long, default_value = "64MiB", value_name = "SIZE")]
    pub(crate) max_upper: ByteSize,
}

#[derive(Debug, Args)]
pub(crate) struct Run {
    #[command(flatten)]
    pub(crate) guest: Guest,
    #[command(flatten)]
    pub(crate) most: Most,
    /// Kill it after so many seconds.
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub(crate) timeout: Option<Duration>,
    /// Clone a saved template; PROGRAM is not given then.
    #[arg(long, value_name = "FILE")]
    pub(crate) template: Option<PathBuf>,
    /// Say on standard error what it used, as JSON with --json.
    #[arg(long)]
    pub(crate) stats: bool,
    /// The program, a static Linux ELF, and its arguments.
    #[arg(
        trailing_var_arg = true,
        value_name = "PROGRAM",
        required_unless_present = "template"
    )]
    pub(crate) program: Vec<OsString>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum TemplateCommand {
    /// Run a program to the point of the snapshot and save it.
    Build(Build),
}

#[derive(Debug, Args)]
pub(crate) struct Build {
    #[command(flatten)]
    pub(crate) guest: Guest,
    /// When it is saved.
    #[arg(long, value_enum, default_value_t = Point::Entry)]
    pub(crate) at: Point,
    /// How long it may take to get there.
    #[arg(long, default_value = "60", value_name = "SECONDS", value_parser = seconds)]
    pub(crate) deadline: Duration,
    /// Where it is saved.
    #[arg(long, short, value_name = "FILE")]
    pub(crate) output: PathBuf,
    /// The program, a static Linux ELF, and its arguments.
    #[arg(trailing_var_arg = true, value_name = "PROGRAM", required = true)]
    pub(crate) program: Vec<OsString>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Point {
    /// Before the first instruction.
    Entry,
    /// At the first system call whose answer differs between clones.
    FirstIdentity,
    /// When it first reads standard input.
    FirstInput,
}

impl From<Point> for SnapshotPoint {
    fn from(point: Point) -> Self {
        match point {
            Point::Entry => Self::Entry,
            Point::FirstIdentity => Self::FirstIdentity,
            Point::FirstInput => Self::FirstInput,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct Storm {
    #[command(flatten)]
    pub(crate) guest: Guest,
    /// How many sandboxes.
    #[arg(long, short, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) number: u32,
    /// What each reads from standard input; nothing without it.
    #[arg(long, value_name = "FILE")]
    pub(crate) input: Option<PathBuf>,
    /// Where the picture goes.
    #[arg(long, value_name = "FILE.svg")]
    pub(crate) svg: Option<PathBuf>,
    /// The program, a static Linux ELF, and its arguments; the first sandbox says what all have to.
    #[arg(trailing_var_arg = true, value_name = "PROGRAM", required = true)]
    pub(crate) program: Vec<OsString>,
}

fn variable(text: &str) -> Result<OsString, &'static str> {
    match text.split_once('=') {
        Some((name, _)) if !name.is_empty() => Ok(text.into()),
        _ => Err("not of the form NAME=VALUE"),
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let number: f64 = text.parse().map_err(|_| "not a number of seconds")?;
    Duration::try_from_secs_f64(number).map_err(|why| why.to_string())
}
