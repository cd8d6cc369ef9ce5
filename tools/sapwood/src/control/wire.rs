//! What is said on the control socket.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use sapwood_image::ImageError;
use sapwood_qos::names::Named;
use sapwood_store::StoreError;
use sapwood_vhost::ServerError;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// What went wrong, for programs and for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// One of a fixed set of names.
    pub kind: String,
    /// What a person should read.
    pub message: String,
}

impl Failure {
    /// A failure of one of the known kinds.
    pub fn new(kind: &str, message: impl Into<String>) -> Self {
        Self { kind: kind.to_owned(), message: message.into() }
    }

    /// Of an error that may be one of ours.
    pub fn of(error: &anyhow::Error) -> Self {
        let message = format!("{error:#}");
        let kind = if let Some(error) = error.downcast_ref::<ImageError>() {
            error.kind.name()
        } else if let Some(error) = error.downcast_ref::<StoreError>() {
            error.kind.name()
        } else if let Some(failure) = error.downcast_ref::<Self>() {
            failure.kind.as_str()
        } else {
            "failed"
        };
        Self::new(kind, message)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self::new(error.kind.name(), error.to_string())
    }
}

impl From<ImageError> for Failure {
    fn from(error: ImageError) -> Self {
        Self::new(error.kind.name(), error.to_string())
    }
}

impl From<ServerError> for Failure {
    fn from(error: ServerError) -> Self {
        let kind = match error {
            ServerError::Queues(_) => "invalid",
            ServerError::InUse(_) | ServerError::NotASocket(_) => "exists",
            _ => "system",
        };
        Self::new(kind, error.to_string())
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::of(&error)
    }
}

/// The body of every answer that is an error.
#[derive(Debug, Serialize, Deserialize)]
pub struct Failed {
    /// What went wrong.
    pub error: Failure,
}

/// The body of `POST /v1/disk/resize`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resize {
    /// The new size in bytes.
    pub size: u64,
    /// Allow the disk to become smaller.
    #[serde(default)]
    pub shrink: bool,
}

/// The body of `POST /v1/disk/limits`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limit {
    /// Values by name; 0 takes one away.
    #[serde(default)]
    pub limits: Named,
    /// Forget all values that are not named.
    #[serde(default)]
    pub reset: bool,
}

/// The body of `POST /v1/disk/rebase`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rebase {
    /// The new base; a relative path starts at the layer's folder. `None`: no base, which has to be said.
    #[serde(deserialize_with = "Option::deserialize")]
    pub base: Option<PathBuf>,
    /// Its format; needed unless it is a layer.
    pub format: Option<String>,
    /// Of a qcow2 base: the snapshot to read.
    #[serde(default)]
    pub snapshot: Option<String>,
    /// Of a qcow2 base: it may name other files.
    #[serde(default, rename = "allow-backing")]
    pub allow_backing: bool,
    /// Of a qcow2 base: the format of backing files that it does not state.
    #[serde(default, rename = "chain-format")]
    pub chain_format: Option<String>,
    /// Neither compare nor copy: only name the base.
    #[serde(default, rename = "unsafe")]
    pub unsafe_: bool,
}

/// The body of requests that say nothing more.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nothing {}

/// How far a job has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// It is not its turn yet.
    Waiting,
    /// It is under way.
    Running,
    /// It has done its work.
    Done,
    /// It could not.
    Failed,
    /// It was told to stop, and has.
    Cancelled,
}

/// A job as it is now.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Job {
    /// Its number, from 1; never used twice by one server.
    pub id: u64,
    /// What it does: of a served disk `resize`, `flatten`, `rebase` or `commit`.
    pub kind: String,
    /// How far it has come.
    pub state: State,
    /// Bytes of work that are done.
    pub done_bytes: u64,
    /// Bytes of work that there are; 0 while that is not known.
    pub total_bytes: u64,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<Failure>,
    /// What it has to say, once it is done; not in a list.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "shared")]
    pub result: Option<Arc<RawValue>>,
}

/// A text that is not copied for each who asks.
mod shared {
    use super::{Arc, Deserialize, RawValue, Serialize};

    type Shared = Option<Arc<RawValue>>;

    pub fn serialize<S: serde::Serializer>(text: &Shared, to: S) -> Result<S::Ok, S::Error> {
        text.as_deref().serialize(to)
    }

    pub fn deserialize<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Shared, D::Error> {
        Ok(Option::<Box<RawValue>>::deserialize(from)?.map(Arc::from))
    }
}

/// The body of `GET /v1/jobs`.
#[derive(Debug, Serialize, Deserialize)]
pub struct JobList {
    /// The newest last.
    pub jobs: Vec<Job>,
}
