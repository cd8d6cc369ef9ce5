//! From a request about a served disk to an answer.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use axum::routing::{get, post};
use serde_json::{Value, json};

use super::Shared;
use super::disk::Served;
use super::http::{self, Answer, Body, Error, HasJobs, Route, json_of, json_text, parse};
use super::jobs::{Job, Jobs};
use super::wire::{Failure, Limit, Nothing, Rebase, Resize};
use crate::cli::info;
use crate::metrics::Statistics;
use crate::metrics::page::Page;

/// The OpenAPI document.
const DOCUMENT: &str = include_str!("../../../../docs/control-api.json");

type Asked = State<Arc<Shared>>;

impl HasJobs for Shared {
    fn jobs(&self) -> &Jobs {
        &self.jobs
    }
}

/// Everything that can be asked: method, path, handler.
fn routes() -> Vec<Route<Shared>> {
    let mut routes = vec![
        ("get", "/v1", get(version)),
        ("get", "/v1/openapi.json", get(document)),
        ("get", "/v1/disk", get(show_disk)),
        ("get", "/v1/disk/limits", get(show_limits)),
        ("post", "/v1/disk/limits", post(limit)),
        ("get", "/v1/statistics", get(statistics)),
        ("get", "/metrics", get(metrics)),
        ("post", "/v1/disk/resize", post(resize)),
        ("post", "/v1/disk/flatten", post(flatten)),
        ("post", "/v1/disk/rebase", post(rebase)),
        ("post", "/v1/disk/commit", post(commit)),
    ];
    routes.extend(http::job_routes());
    routes
}

/// The service.
pub fn router(shared: Arc<Shared>) -> Router {
    http::router(routes(), shared)
}

async fn version() -> Response {
    json_of(StatusCode::OK, &json!({ "api": 1, "version": env!("CARGO_PKG_VERSION") }))
}

async fn document() -> Response {
    json_text(DOCUMENT)
}

async fn show_disk(State(shared): Asked) -> Answer {
    let mut value = info::json(&shared.served.info()?);
    value["read-only"] = shared.served.check_writable().is_err().into();
    value["frontend-connected"] = shared.served.server.is_connected().into();
    value["job"] = shared.jobs.running().into();
    Ok(json_of(StatusCode::OK, &value))
}

async fn show_limits(State(shared): Asked) -> Answer {
    Ok(json_of(StatusCode::OK, &shared.served.limits.get()))
}

async fn limit(State(shared): Asked, body: Body) -> Answer {
    let asked: Limit = parse(body)?;
    Ok(json_of(StatusCode::OK, &shared.served.limits.change(&asked)?))
}

async fn statistics(State(shared): Asked) -> Response {
    json_of(StatusCode::OK, &Statistics::of_served(&shared.served))
}

async fn metrics(State(shared): Asked, headers: HeaderMap) -> Response {
    Page::alone(Statistics::of_served(&shared.served)).response(&headers)
}

/// Starts a job for a disk that can have it done.
fn start(
    shared: &Shared,
    kind: &'static str,
    work: impl FnOnce(&Served, &Arc<Job>) -> anyhow::Result<Value> + Send + 'static,
) -> Answer {
    let served = shared.served.clone();
    let job = shared.jobs.start(kind, "disk", move |job| work(&served, job));
    let job = job.map_err(|refused| Error::from(Failure::from(refused)))?;
    Ok(json_of(StatusCode::ACCEPTED, &job))
}

async fn resize(State(shared): Asked, body: Body) -> Answer {
    let asked: Resize = parse(body)?;
    shared.served.check_writable()?;
    start(&shared, "resize", move |served, _| served.resize(&asked))
}

async fn flatten(State(shared): Asked, body: Body) -> Answer {
    let Nothing {} = parse(body)?;
    shared.served.layer()?;
    start(&shared, "flatten", Served::flatten)
}

async fn rebase(State(shared): Asked, body: Body) -> Answer {
    let asked: Rebase = parse(body)?;
    shared.served.layer()?;
    start(&shared, "rebase", move |served, job| served.rebase(asked, job))
}

async fn commit(State(shared): Asked, body: Body) -> Answer {
    let Nothing {} = parse(body)?;
    shared.served.layer()?;
    start(&shared, "commit", Served::commit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_has_the_same_routes() {
        let document: Value = serde_json::from_str(DOCUMENT).unwrap();
        let served = routes().into_iter().map(|(method, path, _)| (method.to_owned(), path.to_owned()));
        assert_eq!(http::documented(&document), served.collect());
    }
}
