//! Commands that go to the server of a disk, or to the disk itself.

use std::path::{Path, PathBuf};

use clap::Args;
use sapwood_image::{ErrorKind, ImageError};
use serde::Serialize;
use serde_json::Value;

use super::progress;
use crate::control::client::Client;

/// The server to ask.
#[derive(Args, Debug)]
pub struct Online {
    /// Ask the server of the disk, at the socket that its --control names, instead of naming the disk
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
}

/// The disk that a command is about.
pub enum Target<'a> {
    /// Served: ask there.
    Served(Client<'a>),
    /// Free: change it here.
    Free(&'a Path),
}

impl Online {
    /// Where a command goes; clap sees to it that `path` is there when no server is.
    pub fn target<'a>(&'a self, path: Option<&'a PathBuf>) -> anyhow::Result<Target<'a>> {
        match (&self.control, path) {
            (Some(socket), _) => Ok(Target::Served(Client::new(socket))),
            (None, Some(path)) => Ok(Target::Free(path)),
            (None, None) => anyhow::bail!("which disk?"),
        }
    }
}

/// Has a job done by a server, with a bar; the disk's name, and what the job answers.
pub fn run(
    client: &Client<'_>,
    path: &str,
    body: &impl Serialize,
    quiet: bool,
) -> anyhow::Result<(String, Value)> {
    let name = client.disk()?["filename"].as_str().unwrap_or_default().to_owned();
    let result = client.run(path, body, &progress::bar(0, quiet))?;
    Ok((name, result))
}

/// Says what to do about a disk that is being served.
pub fn advise<T>(result: anyhow::Result<T>) -> anyhow::Result<T> {
    result.map_err(|error| match error.downcast_ref::<ImageError>() {
        Some(ImageError { path, kind: ErrorKind::Locked { holder } }) if holder.contains("sapwood serve") => {
            anyhow::anyhow!(
                "{}: in use by {holder}: stop it first, or pass --control with the socket that its --control \
                 names instead of the disk",
                path.display()
            )
        }
        _ => error,
    })
}
