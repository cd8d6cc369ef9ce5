//! `sapwood daemon`.

use std::path::PathBuf;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::thread;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use sapwood_qos::arbiter::WEIGHT_MAX;
use sapwood_qos::governor::{BACKGROUND_WEIGHT_DEFAULT, IN_FLIGHT_DEFAULT};
use sapwood_vmm::run::allow_descriptors;
use signal_hook::iterator::Signals;

use super::super::serve::signals;
use crate::cli::output;
use crate::host::Host;
use crate::metrics::listen::Loopback;
use crate::volumes::address::default_store;
use crate::volumes::daemon::{Daemon, Options, notify};
use crate::volumes::look::ShowStore;
use crate::volumes::operation::Quick;
use crate::volumes::service::{Service, private};

/// How often it looks whether it has to end.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Why it ends by itself.
const UNKNOWN: &str = "a change of the catalog failed, and may have been made or not";

/// Serve a store: its volumes to virtual machines, and itself to the command line
///
/// What was attached when the last daemon ended, however that was, is attached again. Prints one line when it is
/// ready. While it runs, all commands about the store go to it. SIGTERM or SIGINT ends
/// it: requests are drained, everything is made durable, and the exit code is 0. A second signal ends it at once
/// (exit code 130); then, as after a crash, what was flushed is there. It ends by itself, with exit code 1, when a change
/// could not be written to the catalog, or its file failed otherwise: nothing can be done with the store then until it is opened again.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood daemon --store /srv/vms
  sapwood daemon --store /srv/vms --sockets /run/vms

Notes go to standard error; SAPWOOD_LOG=debug shows more of them, SAPWOOD_LOG=warn fewer.")]
pub struct DaemonCommand {
    /// Directory of the store; by default the environment's SAPWOOD_STORE
    #[arg(long, value_name = "DIR")]
    store: Option<PathBuf>,

    /// Where it takes orders; only this user may connect. By default daemon.sock in the store
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,

    /// Folder for the sockets of attached volumes; by default sockets in the store
    #[arg(long, value_name = "DIR")]
    sockets: Option<PathBuf>,

    /// Where this host's Prometheus gets its page, for example 127.0.0.1:9123; the control socket has the same page
    #[arg(long, value_name = "ADDRESS")]
    metrics: Option<Loopback>,

    /// Attach nothing again, and forget what was attached
    #[arg(long)]
    no_restore: bool,

    /// Seal nothing, and collect nothing, but what is asked for
    #[arg(long)]
    no_background: bool,

    /// Requests that all volumes together have under way, at most, as soon as one has a weight or a reservation
    #[arg(long, value_name = "N", default_value_t = IN_FLIGHT_DEFAULT as u32, value_parser = clap::value_parser!(u32).range(1..=4096))]
    in_flight: u32,

    /// The weight that sealing, collecting, importing and the like have beside the volumes then
    #[arg(long, value_name = "N", default_value_t = BACKGROUND_WEIGHT_DEFAULT,
        value_parser = clap::value_parser!(u32).range(1..=i64::from(WEIGHT_MAX)))]
    background_weight: u32,
}

impl DaemonCommand {
    pub fn run(self, host: &Host) -> anyhow::Result<()> {
        crate::abort_on_panic();
        allow_descriptors();
        // Before there are threads: the sockets, and all else we make, are this user's alone.
        private();
        let mut signals = signals(true).context("cannot take signals")?;
        let store = default_store(self.store.as_deref())?;
        let options = Options {
            store,
            socket: self.socket,
            sockets: self.sockets,
            metrics: self.metrics,
            restore: !self.no_restore,
            background: !self.no_background,
            in_flight: self.in_flight as usize,
            background_weight: self.background_weight,
        };
        let daemon = Daemon::start(*host, &options)?;
        let stat = ShowStore {}.run(daemon.service())?;
        let volumes =
            if stat.volumes == 1 { "1 volume".to_owned() } else { format!("{} volumes", stat.volumes) };
        let (store, socket) = (stat.path.display(), daemon.socket().display());
        output::print(&format!("Serving the store {store} ({volumes}) at {socket}\n"))?;
        notify("READY=1");
        let is_asked = until_the_end(&mut signals, daemon.service());
        log::info!("stopping: a second signal ends this at once");
        notify("STOPPING=1");
        let stopped = daemon.stop();
        anyhow::ensure!(is_asked, "{UNKNOWN}: start the daemon again, which finds out");
        stopped?;
        log::info!("stopped: everything is durable");
        Ok(())
    }
}

/// Waits for a signal; false when there was none, and nothing can be done any more until the store is opened again.
fn until_the_end(signals: &mut Signals, service: &Service) -> bool {
    let (over, is_over) = sync_channel::<()>(0);
    let waiting = signals.handle();
    thread::scope(|scope| {
        scope.spawn(move || {
            while is_over.recv_timeout(LOOK_INTERVAL) == Err(RecvTimeoutError::Timeout) {
                if service.store().catalog().is_unknown() {
                    log::error!("{UNKNOWN}: the daemon ends");
                    return waiting.close();
                }
            }
        });
        let signal = signals.forever().next();
        drop(over);
        signal.is_some()
    })
}
