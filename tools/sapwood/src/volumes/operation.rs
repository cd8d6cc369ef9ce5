//! What can be asked of a store: each thing is an operation, with a method and a path for HTTP, and something
//! that runs it where the store is open.
//!
//! An operation is an object of JSON. The fields that the path names in braces are in the path, all
//! others in the body; so the command line, the daemon and other programs say the same thing in the same way.

use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::service::Service;
use crate::control::jobs::Job;
use crate::control::wire::Failure;

/// How an operation is asked for over HTTP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// It changes nothing.
    Get,
    /// It changes something.
    Post,
    /// It takes something away.
    Delete,
}

impl Method {
    /// Its name, as OpenAPI writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::Post => "post",
            Self::Delete => "delete",
        }
    }
}

/// Something that can be asked.
pub trait Operation: Serialize + DeserializeOwned + Send + 'static {
    /// What it answers.
    type Answer: Serialize + DeserializeOwned + Send + 'static;
    /// How it is asked for.
    const METHOD: Method;
    /// Where, with the names of fields in braces.
    const PATH: &'static str;
}

/// What is answered at once.
pub trait Quick: Operation {
    /// Does it.
    fn run(self, service: &Arc<Service>) -> Result<Self::Answer, Failure>;
}

/// What may take long, and is a job.
pub trait Long: Operation {
    /// What the job is called.
    const KIND: &'static str;

    /// What it is about: of jobs about the same, one runs at a time.
    fn about(&self) -> String;

    /// Does it, on the job's own thread.
    fn run(self, service: &Arc<Service>, job: &Arc<Job>) -> Result<Self::Answer, Failure>;
}

/// Says of a type that it is an operation.
macro_rules! operation {
    ($type:ident: $method:ident $path:literal -> $answer:ty) => {
        impl $crate::volumes::operation::Operation for $type {
            type Answer = $answer;
            const METHOD: $crate::volumes::operation::Method = $crate::volumes::operation::Method::$method;
            const PATH: &'static str = $path;
        }
    };
}
pub(crate) use operation;

/// The name of a field in a piece of a path.
fn field(piece: &str) -> Option<&str> {
    piece.strip_prefix('{')?.strip_suffix('}')
}

/// The path and the body that ask for an operation.
pub fn request<O: Operation>(operation: &O) -> anyhow::Result<(String, Value)> {
    let Value::Object(mut fields) = serde_json::to_value(operation)? else {
        anyhow::bail!("an operation is an object")
    };
    let mut path = String::new();
    for piece in O::PATH.split('/').skip(1) {
        path.push('/');
        match field(piece).map(|name| fields.remove(name)) {
            Some(Some(Value::String(value))) => encode(&value, &mut path),
            Some(_) => anyhow::bail!("{}: its text {piece} is missing", O::PATH),
            None => path.push_str(piece),
        }
    }
    Ok((path, Value::Object(fields)))
}

/// The operation that a request asks for, whose path has these parameters.
pub fn read<O: Operation>(
    parameters: impl IntoIterator<Item = (String, String)>,
    mut body: Map<String, Value>,
) -> Result<O, String> {
    for (name, value) in parameters {
        if body.insert(name.clone(), Value::String(value)).is_some() {
            return Err(format!("{name} is said by the path, and must not be in the body"));
        }
    }
    serde_json::from_value(Value::Object(body)).map_err(|error| error.to_string())
}

/// Percent-encodes all that is not allowed everywhere in a URL.
fn encode(text: &str, to: &mut String) {
    const DIGITS: &[u8; 16] = b"0123456789ABCDEF";
    // A path must not have a piece that means a folder.
    let is_dots = text == "." || text == "..";
    for byte in text.bytes() {
        let plain =
            byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'~') || byte == b'.' && !is_dots;
        if plain {
            to.push(char::from(byte));
        } else {
            to.push('%');
            to.push(char::from(DIGITS[usize::from(byte >> 4)]));
            to.push(char::from(DIGITS[usize::from(byte & 15)]));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Paint {
        volume: String,
        snapshot: String,
        colour: u32,
    }

    operation!(Paint: Post "/v1/volumes/{volume}/snapshots/{snapshot}/paint" -> ());

    #[test]
    fn an_operation_survives_being_asked_for() {
        let paint = Paint { volume: "före 1/2%".into(), snapshot: "..".into(), colour: 7 };
        let (path, body) = request(&paint).unwrap();
        assert_eq!(path, "/v1/volumes/f%C3%B6re%201%2F2%25/snapshots/%2E%2E/paint");
        assert_eq!(body, serde_json::json!({ "colour": 7 }));
        let parameters = || [("volume", "före 1/2%"), ("snapshot", "..")].map(|(a, b)| (a.into(), b.into()));
        let Value::Object(body) = body else { panic!("an object") };
        assert_eq!(read(parameters(), body.clone()), Ok(paint));
        for (field, why) in [("volume", "in the body"), ("size", "unknown field")] {
            let mut body = body.clone();
            body.insert(field.into(), "x".into());
            let error = read::<Paint>(parameters(), body).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }
}
