//! Tests and benches with several processes: the same binary, started again in another role.
//!
//! A role of a test binary is an ignored test that does nothing unless it was started as a role;
//! a role of a program or of a bench target with a `main` of its own is named there by [`arguments`].
//!
//! ```no_run
//! use carlsbad_kit::child::{self, Role};
//!
//! #[test]
//! #[ignore = "a role of `a_killed_writer_is_noticed`"]
//! fn role_writer() {
//!     let Some(path) = child::arguments::<String>("role_writer") else { return };
//!     child::tell("ready");
//!     std::fs::write(path, "…").unwrap();
//! }
//!
//! #[test]
//! fn a_killed_writer_is_noticed() {
//!     let mut writer = Role::test("role_writer").start(&"/dev/shm/x").unwrap();
//!     writer.hear("ready").unwrap();
//!     writer.kill();
//! }
//! ```

use std::io::{self, BufRead, BufReader, Write};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::seed::Rng;

const ROLE: &str = "CARLSBAD_ROLE";
const ARGUMENTS: &str = "CARLSBAD_ROLE_ARGUMENTS";
/// What a role tells stands behind this mark, so that a test harness' own output is not mistaken
/// for it.
const MARK: &str = "@carlsbad ";

/// How long [`Child::hear`] and [`Child::wait`] wait.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// A role that this binary can play in another process.
#[derive(Debug)]
pub struct Role {
    name: String,
    command: Command,
}

impl Role {
    /// The ignored test called `name` (with its modules: `kill::role_writer`) of this test binary.
    pub fn test(name: &str) -> Self {
        let mut role = Self::main(name);
        role.command.args([
            "--exact",
            name,
            "--ignored",
            "--nocapture",
            "--test-threads=1",
        ]);
        role
    }

    /// A role that this program's `main` looks for by [`arguments`].
    pub fn main(name: &str) -> Self {
        // Not `current_exe`: the file may be replaced by a build while the test runs.
        let mut command = Command::new("/proc/self/exe");
        command.env(ROLE, name);
        Self {
            name: name.to_owned(),
            command,
        }
    }

    /// The same role started by `program` with `arguments` in front, such as `setpriv` or
    /// `unshare`. The program must keep the environment and exec the role in the end.
    #[must_use]
    pub fn by(self, program: &str, arguments: &[&str]) -> Self {
        let executable = std::env::current_exe().unwrap_or_else(|_| "/proc/self/exe".into());
        let mut command = Command::new(program);
        command
            .args(arguments)
            .arg(executable)
            .args(self.command.get_args())
            .env(ROLE, &self.name);
        for (key, value) in self.command.get_envs() {
            match value {
                Some(value) => command.env(key, value),
                None => command.env_remove(key),
            };
        }
        Self {
            name: self.name,
            command,
        }
    }

    /// Sets a variable in the role's environment.
    #[must_use]
    pub fn env(mut self, key: &str, value: &str) -> Self {
        self.command.env(key, value);
        self
    }

    /// Starts the role.
    ///
    /// # Errors
    /// Where the process cannot be started or the arguments are not expressible in JSON.
    pub fn start(mut self, arguments: &impl Serialize) -> io::Result<Child> {
        let mut process = self
            .command
            .env(ARGUMENTS, serde_json::to_string(arguments)?)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let stdout = process.stdout.take();
        let (sender, told) = channel();
        // Reads until the role ends, and is joined there.
        let reader = std::thread::spawn(move || {
            for line in stdout.into_iter().flat_map(|s| BufReader::new(s).lines()) {
                let Ok(line) = line else { return };
                if let Some((_, words)) = line.split_once(MARK)
                    && sender.send(words.to_owned()).is_err()
                {
                    return;
                }
            }
        });
        Ok(Child {
            name: self.name,
            process,
            told,
            reader: Some(reader),
        })
    }
}

/// The arguments of the role called `name`, where this process was started in it.
///
/// # Panics
/// Where the arguments are of another type than the ones given to [`Role::start`].
pub fn arguments<T: DeserializeOwned>(name: &str) -> Option<T> {
    if std::env::var(ROLE).ok()? != name {
        return None;
    }
    let text = std::env::var(ARGUMENTS).unwrap_or_default();
    match serde_json::from_str(&text) {
        Ok(arguments) => Some(arguments),
        Err(why) => panic!("role {name}: arguments {text}: {why}"),
    }
}

/// Tells the process that started this role one line of words.
pub fn tell(words: impl std::fmt::Display) {
    let mut out = io::stdout().lock();
    // On a line of its own, whatever a test harness has written so far. Where the other side is
    // gone there is nobody to tell.
    let _gone = writeln!(out, "\n{MARK}{words}").and_then(|()| out.flush());
}

/// Waits for a line from the process that started this role, or until that process is gone.
pub fn wait_for_parent() -> Option<String> {
    let mut line = String::new();
    match io::stdin().lock().read_line(&mut line) {
        Ok(n) if n > 0 => Some(line.trim_end().to_owned()),
        _ => None,
    }
}

/// A process in a role. It is killed and waited for when the handle goes away.
#[derive(Debug)]
pub struct Child {
    name: String,
    process: std::process::Child,
    told: Receiver<String>,
    reader: Option<JoinHandle<()>>,
}

impl Child {
    /// Its process id.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// The next words that it tells.
    ///
    /// # Errors
    /// Where it ended without telling anything more, or said nothing for a minute.
    pub fn hear_any(&self) -> io::Result<String> {
        self.told.recv_timeout(DEADLINE).map_err(|why| match why {
            RecvTimeoutError::Timeout => {
                io::Error::new(io::ErrorKind::TimedOut, format!("{}: silent", self.name))
            }
            RecvTimeoutError::Disconnected => io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("{} ended without a word", self.name),
            ),
        })
    }

    /// Waits until it tells words that begin with `start`, and gives the rest of them.
    ///
    /// # Errors
    /// As [`hear_any`](Self::hear_any).
    pub fn hear(&self, start: &str) -> io::Result<String> {
        loop {
            if let Some(rest) = self.hear_any()?.strip_prefix(start) {
                return Ok(rest.trim_start().to_owned());
            }
        }
    }

    /// Gives it a line, which it reads by [`wait_for_parent`].
    ///
    /// # Errors
    /// Where it is gone.
    pub fn say(&mut self, words: &str) -> io::Result<()> {
        match &mut self.process.stdin {
            Some(stdin) => writeln!(stdin, "{words}"),
            None => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    /// Kills it with SIGKILL and waits for it. Says whether it had still been running.
    pub fn kill(&mut self) -> bool {
        let running = matches!(self.process.try_wait(), Ok(None));
        let _already_gone = self.process.kill();
        let killed = self.process.wait().is_ok_and(|status| {
            use std::os::unix::process::ExitStatusExt;
            status.signal() == Some(nix::sys::signal::SIGKILL as i32)
        });
        running && killed
    }

    /// Waits until it ends.
    ///
    /// # Errors
    /// Where it has not ended within a minute; it is killed then.
    pub fn wait(&mut self) -> io::Result<ExitStatus> {
        drop(self.process.stdin.take());
        let start = Instant::now();
        while start.elapsed() < DEADLINE {
            if let Some(status) = self.process.try_wait()? {
                return Ok(status);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        self.kill();
        Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("{} did not end", self.name),
        ))
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.kill();
        if let Some(reader) = self.reader.take() {
            let _panicked = reader.join();
        }
    }
}

/// How a series of kills went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct KillReport {
    /// Roles that were running when the signal came.
    pub killed: usize,
    /// Roles that had already done their work.
    pub finished: usize,
}

/// Starts a role `times` times, kills each at a random moment within `window`, and calls `after`
/// when it is dead. A series in which nobody was killed, or nobody ever finished, aimed badly:
/// look at the report.
///
/// # Errors
/// Where a role cannot be started.
pub fn kill_at_random(
    rng: &mut Rng,
    times: usize,
    window: Duration,
    mut start: impl FnMut(usize) -> io::Result<Child>,
    mut after: impl FnMut(usize),
) -> io::Result<KillReport> {
    let mut report = KillReport::default();
    for round in 0..times {
        let mut child = start(round)?;
        std::thread::sleep(window.mul_f64(rng.f64()));
        if child.kill() {
            report.killed += 1;
        } else {
            report.finished += 1;
        }
        drop(child);
        after(round);
    }
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::{Role, arguments, kill_at_random, tell, wait_for_parent};
    use std::time::Duration;

    #[test]
    #[ignore = "a role of the tests below"]
    fn role_echo() {
        let Some(greeting) = arguments::<String>("child::tests::role_echo") else {
            return;
        };
        tell(format!("hello {greeting}"));
        while let Some(line) = wait_for_parent() {
            tell(format!("heard {line}"));
        }
    }

    #[test]
    fn a_role_hears_and_answers_and_ends_with_its_input() {
        let mut child = Role::test("child::tests::role_echo")
            .start(&"world")
            .unwrap();
        assert_eq!(child.hear("hello").unwrap(), "world");
        child.say("one").unwrap();
        assert_eq!(child.hear_any().unwrap(), "heard one");
        assert!(child.wait().unwrap().success());
        assert!(child.hear_any().is_err());
    }

    #[test]
    fn a_role_that_is_not_played_does_nothing() {
        assert_eq!(arguments::<String>("nobody"), None);
    }

    #[test]
    fn roles_are_killed_while_they_run() {
        let mut rng = crate::seed::rng("roles_are_killed_while_they_run");
        let mut dead = 0;
        let report = kill_at_random(
            &mut rng,
            5,
            Duration::from_millis(5),
            |_| Role::test("child::tests::role_echo").start(&"x"),
            |_| dead += 1,
        )
        .unwrap();
        assert_eq!((report.killed, report.finished, dead), (5, 0, 5));
    }

    #[test]
    fn a_role_can_be_started_by_another_program() {
        let child = Role::test("child::tests::role_echo")
            .by("env", &["-u", "NOTHING"])
            .start(&"env")
            .unwrap();
        assert_eq!(child.hear("hello").unwrap(), "env");
    }
}
