//! One QEMU process: its serial line on its standard input and output, and its monitor (QMP) on a
//! socket.

use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use carlsbad_types::ByteSize;
use serde_json::{Value, json};

use crate::error::{Error, Result};

/// Where a machine's sockets lie for a moment, until both sides have opened them.
const SOCKETS: &str = "/tmp";
/// The kernel's arguments: quiet, and a reset where it would wait.
const KERNEL: &str = "console=ttyS0 quiet reboot=t panic=-1 random.trust_cpu=on";

/// For `map_err`.
pub(super) fn failed<E: std::fmt::Display>(what: &'static str) -> impl FnOnce(E) -> Error {
    move |why| Error::Qemu {
        what,
        why: why.to_string(),
    }
}

/// What every machine of a template has in common.
#[derive(Debug, Clone)]
pub(super) struct Shape {
    pub(super) program: PathBuf,
    /// `tcg` or `kvm`.
    pub(super) accelerator: &'static str,
    pub(super) kernel: PathBuf,
    pub(super) initramfs: PathBuf,
    pub(super) memory: ByteSize,
    pub(super) arguments: String,
}

/// Whether a machine writes to the memory file, or to pages of its own over it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Memory {
    Shared,
    Private,
}

/// A running QEMU. It is killed when it is dropped.
#[derive(Debug)]
pub(super) struct Machine {
    child: Child,
    monitor: Monitor,
    pub(super) input: Option<ChildStdin>,
    pub(super) output: Option<ChildStdout>,
}

impl Machine {
    /// Starts a machine whose memory is the file behind `memory`. It runs at once, or waits for a
    /// state ([`restore`](Self::restore)).
    ///
    /// The thread that calls this has to live as long as the machine: QEMU is killed with it.
    pub(super) fn start(
        shape: &Shape,
        memory: &OwnedFd,
        kind: Memory,
        deadline: Instant,
    ) -> Result<Self> {
        let socket = Path::new(SOCKETS).join(format!("rund-qmp-{:016x}", fastrand::u64(..)));
        let backend = format!(
            "memory-backend-file,id=m,size={},mem-path={},share={}",
            shape.memory.get(),
            path_of(memory),
            if kind == Memory::Shared { "on" } else { "off" }
        );
        let mut command = Command::new(&shape.program);
        command
            .args(["-M", "microvm,acpi=off,memory-backend=m"])
            .args(["-accel", shape.accelerator, "-cpu", "max"])
            .arg("-m")
            .arg(format!("{}B", shape.memory.get()))
            .arg("-object")
            .arg(backend)
            .args(["-nodefaults", "-no-user-config", "-nographic", "-no-reboot"])
            .args([
                "-serial",
                "stdio",
                "-sandbox",
                "on,obsolete=deny,elevateprivileges=deny",
            ])
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", socket.display()))
            .arg("-kernel")
            .arg(&shape.kernel)
            .arg("-initrd")
            .arg(&shape.initramfs)
            .arg("-append")
            .arg(format!("{KERNEL} {}", shape.arguments));
        if kind == Memory::Private {
            command.args(["-incoming", "defer"]);
        }
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        // SAFETY: between fork and exec it makes one system call, which is async-signal-safe.
        unsafe { command.pre_exec(die_with_parent) };
        let mut child = command.spawn().map_err(failed("start"))?;
        let monitor = Monitor::connect(&socket, &mut child, deadline);
        let _opened = std::fs::remove_file(&socket);
        let monitor = match monitor {
            Ok(monitor) => monitor,
            Err(why) => {
                let _gone = child.kill();
                let _gone = child.wait();
                return Err(why);
            }
        };
        Ok(Self {
            input: child.stdin.take(),
            output: child.stdout.take(),
            child,
            monitor,
        })
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A second way to its monitor, for another thread.
    pub(super) fn monitor(&self) -> Result<Monitor> {
        self.monitor.again()
    }

    /// Stops it and writes all but its memory to the file behind `state`.
    pub(super) fn save(&mut self, state: &OwnedFd, deadline: Instant) -> Result<()> {
        self.monitor.run("stop", &json!({}))?;
        self.ignore_memory()?;
        // A path of digits and slashes: the shell that QEMU calls has nothing to take apart.
        let uri = format!("exec:cat > {}", path_of(state));
        self.monitor.run("migrate", &json!({ "uri": uri }))?;
        self.migrated(deadline)?;
        // It may go before it has answered.
        let _gone = self.monitor.run("quit", &json!({}));
        self.wait().map(|_| ())
    }

    /// Reads the state that another machine of this shape wrote, and goes on from there.
    pub(super) fn restore(&mut self, state: &OwnedFd, deadline: Instant) -> Result<()> {
        self.ignore_memory()?;
        let uri = format!("exec:cat {}", path_of(state));
        self.monitor
            .run("migrate-incoming", &json!({ "uri": uri }))?;
        self.migrated(deadline)?;
        self.monitor.run("cont", &json!({}))?;
        Ok(())
    }

    /// Memory is in a file that both sides map: it is not sent.
    fn ignore_memory(&mut self) -> Result<()> {
        let capability = json!([{"capability": "x-ignore-shared", "state": true}]);
        let arguments = json!({ "capabilities": capability });
        self.monitor.run("migrate-set-capabilities", &arguments)?;
        Ok(())
    }

    fn migrated(&mut self, deadline: Instant) -> Result<()> {
        loop {
            let now = self.monitor.run("query-migrate", &json!({}))?;
            match now["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => {
                    return Err(failed("move its state")(&now["error-desc"]));
                }
                _ if Instant::now() > deadline => {
                    return Err(failed("move its state")("it takes too long"));
                }
                _ => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    /// Waits for its end; whether it was killed.
    pub(super) fn wait(&mut self) -> Result<Option<i32>> {
        use std::os::unix::process::ExitStatusExt;

        let status = self.child.wait().map_err(failed("wait for it"))?;
        Ok(status.signal())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _gone = self.child.wait();
    }
}

/// Has the kernel kill this process with the thread that started it.
fn die_with_parent() -> io::Result<()> {
    // SAFETY: prctl takes numbers, and writes no memory.
    match unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A file of ours, as another process of ours opens it.
fn path_of(file: &OwnedFd) -> String {
    format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd())
}

/// The QEMU machine protocol: one line of JSON each way.
#[derive(Debug)]
pub(super) struct Monitor {
    lines: BufReader<UnixStream>,
}

/// How long QEMU may take to answer.
const ANSWER: Duration = Duration::from_secs(30);

impl Monitor {
    fn connect(socket: &Path, child: &mut Child, deadline: Instant) -> Result<Self> {
        let stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(why) => {
                    if let Ok(Some(status)) = child.try_wait() {
                        return Err(failed("start")(status));
                    }
                    if Instant::now() > deadline {
                        return Err(failed("reach its monitor")(why));
                    }
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        };
        stream
            .set_read_timeout(Some(ANSWER))
            .map_err(failed("reach its monitor"))?;
        let mut monitor = Self {
            lines: BufReader::new(stream),
        };
        let _greeting = monitor.hear()?;
        monitor.run("qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }

    fn again(&self) -> Result<Self> {
        let stream = self.lines.get_ref().try_clone();
        Ok(Self {
            lines: BufReader::new(stream.map_err(failed("reach its monitor"))?),
        })
    }

    fn hear(&mut self) -> Result<Value> {
        let mut line = String::new();
        match self.lines.read_line(&mut line) {
            Ok(0) => Err(failed("hear from it")("it is gone")),
            Ok(_) => serde_json::from_str(&line).map_err(failed("understand it")),
            Err(why) => Err(failed("hear from it")(why)),
        }
    }

    /// Runs a command and gives its answer.
    pub(super) fn run(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let mut line = json!({"execute": command, "arguments": arguments}).to_string();
        line.push('\n');
        let written = self.lines.get_mut().write_all(line.as_bytes());
        written.map_err(failed("speak to it"))?;
        loop {
            let mut answer = self.hear()?;
            if let Some(error) = answer.get("error") {
                return Err(failed("run a command")(&error["desc"]));
            }
            if answer.get("return").is_some() {
                return Ok(answer["return"].take());
            }
            // An event, of which nobody here asks.
        }
    }
}
