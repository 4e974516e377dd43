//! A sandbox: a clone together with what was leased for it.

use std::fs::File;
use std::time::Duration;

use crate::backend::{Exit, Instance, KillHandle, Stats};
use crate::error::Result;
use crate::runtime::Name;

/// A running clone of a template. It is killed when the handle goes away.
#[derive(Debug)]
pub struct Sandbox {
    // In this order: its name is free when it is gone.
    instance: Box<dyn Instance>,
    name: Name,
}

impl Sandbox {
    pub(crate) fn new(name: Name, instance: Box<dyn Instance>) -> Self {
        Self { instance, name }
    }

    /// Its name.
    pub fn id(&self) -> &str {
        &self.name.id
    }

    /// Waits for its end, or until `deadline` is over. After the end it gives the same answer
    /// again; several threads may wait.
    ///
    /// # Errors
    /// [`DeadlineExceeded`](crate::Error::DeadlineExceeded), after which it may be waited for
    /// again; [`HelperGone`](crate::Error::HelperGone) where its process vanished.
    pub fn wait(&self, deadline: Option<Duration>) -> Result<Exit> {
        self.instance.wait(deadline)
    }

    /// A handle that ends it, usable while another thread waits.
    pub fn kill_handle(&self) -> KillHandle {
        self.instance.kill_handle()
    }

    /// What it has used until now, and what it was given.
    ///
    /// # Errors
    /// Where the operating system does not say.
    pub fn stats(&self) -> Result<Stats> {
        self.instance.stats()
    }

    /// The process that holds its machine.
    pub fn pid(&self) -> Option<u32> {
        self.instance.pid()
    }

    /// Stops it where it is.
    ///
    /// # Errors
    /// Where the operating system refuses.
    pub fn pause(&self) -> Result<()> {
        self.instance.pause()
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// Where the operating system refuses.
    pub fn resume(&self) -> Result<()> {
        self.instance.resume()
    }

    /// The other end of a piped standard input, once.
    pub fn take_stdin(&self) -> Option<File> {
        self.instance.take_stdin()
    }

    /// The other end of a piped standard output, once.
    pub fn take_stdout(&self) -> Option<File> {
        self.instance.take_stdout()
    }

    /// The other end of a piped standard error, once.
    pub fn take_stderr(&self) -> Option<File> {
        self.instance.take_stderr()
    }

    /// After the end of a clone that asked for it ([`CloneSpec::verify_reset`](crate::CloneSpec)):
    /// what of its machine differs from the template after the reset. `None` where it was not
    /// reset.
    pub fn reset_differences(&self) -> Option<Vec<String>> {
        self.instance.reset_differences()
    }
}
