//! The page for Prometheus over TCP, at an address of this host.

use std::net::{SocketAddr, TcpListener};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use axum::Router;
use axum::http::HeaderMap;
use axum::response::Response;
use axum::routing::get;
use tokio::task::spawn_blocking;

use super::page::Page;
use crate::control::http::{self, Error};
use crate::control::listen::Listener;
use crate::control::wire::Failure;
use crate::volumes::service::system;

/// Time for a whole connection.
const CONNECTION_TIME_MAX: Duration = Duration::from_secs(60);

/// An address that only this host reaches: who connects is not asked who they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loopback(SocketAddr);

impl FromStr for Loopback {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let address: SocketAddr =
            text.parse().map_err(|_| "an address and a port, as in 127.0.0.1:9123".to_owned())?;
        if !address.ip().is_loopback() {
            return Err(format!(
                "{}: other hosts may reach that; only addresses such as 127.0.0.1 and [::1] are taken",
                address.ip()
            ));
        }
        Ok(Self(address))
    }
}

/// Makes a page. It may block.
pub type MakePage = Arc<dyn Fn() -> Result<Page, Failure> + Send + Sync>;

/// Answers with a page.
pub async fn answer(page: MakePage, headers: HeaderMap) -> Result<Response, Error> {
    let page = spawn_blocking(move || page()).await.map_err(system)??;
    Ok(page.response(&headers))
}

/// Listens at an address for who wants the page.
pub fn start(Loopback(address): Loopback, page: MakePage) -> anyhow::Result<Listener> {
    let bound = TcpListener::bind(address).with_context(|| format!("cannot listen at {address}"))?;
    let routes = vec![("get", "/metrics", get(move |headers| answer(Arc::clone(&page), headers)))];
    let router: Router = http::router(routes, Arc::new(()));
    log::info!("metrics are at http://{}/metrics", bound.local_addr()?);
    Listener::start_tcp(bound, router, CONNECTION_TIME_MAX)
}
