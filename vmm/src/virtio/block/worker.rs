//! The thread of a disk.
//!
//! When the connection ends while the machine runs, the thread connects again, for as long as it takes:
//! - A backend that came back has to offer what the guest was offered, and a disk that is not smaller.
//! - Where the backend keeps note of what is in flight, it gets the same region again, and the queues go on behind
//!   the last answer in guest memory: what was in flight is done (again).
//! - Where it does not, the queues go on only if nothing was in flight when it went; otherwise the machine fails.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vm_memory::GuestMemoryMmap;

use crate::interrupts::borrow;
use crate::virtio::block::connection::{Connection, Handle, Inflight, Offer};
use crate::virtio::block::{self, Error, rings};
use crate::virtio::device::{self, Link, Start, Wanted};

/// How often to look for a backend that has gone.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);
/// Different reasons for not finding it that are logged each time that it has gone.
const REASONS_MAX: usize = 8;

/// What the driver has started.
struct Running {
    start: Arc<Start>,
    /// Set when the backend may have taken requests.
    begun: bool,
    /// Whether requests were in flight when the backend went.
    unanswered: bool,
    inflight: Option<Inflight>,
}

impl Running {
    fn new(start: Arc<Start>) -> Self {
        Self { start, begun: false, unanswered: false, inflight: None }
    }
}

/// A disk as its thread sees it.
pub(super) struct Disk<R> {
    socket: PathBuf,
    link: Arc<Link>,
    memory: GuestMemoryMmap<()>,
    /// What the guest was offered.
    features: u64,
    queues: u16,
    connection: Option<Connection>,
    epoch: u64,
    running: Option<Running>,
    /// What the driver has set since it began. The backend takes it once it knows the features.
    writeback: Option<u8>,
    /// When to look for the backend next.
    retry: Instant,
    /// Why it was not found, as far as that has been logged.
    reasons: Vec<String>,
    report: R,
    /// Requests were lost.
    lost: bool,
}

impl<R: Fn(Error)> Disk<R> {
    pub(super) fn new(
        socket: PathBuf,
        link: Arc<Link>,
        memory: GuestMemoryMmap<()>,
        device: &device::Device,
        report: R,
    ) -> Self {
        Self {
            socket,
            link,
            memory,
            features: device.features,
            queues: device.queues,
            connection: None,
            epoch: 0,
            running: None,
            writeback: None,
            retry: Instant::now(),
            reasons: Vec::new(),
            report,
            lost: false,
        }
    }

    /// Does what is wanted until the end is.
    pub(super) fn run(mut self, connection: Connection, handle: Handle) {
        self.connection = Some(connection);
        loop {
            let wanted = self.link.take();
            if wanted.end {
                // The guest does not run any more, but what it has asked for is to be done in order.
                return self.stop();
            }
            self.obey(wanted);
            if self.connection.is_none() && !self.lost && self.retry <= Instant::now() {
                self.reconnect(&handle);
            }
            self.wait();
        }
    }

    fn obey(&mut self, wanted: Wanted) {
        let before = std::mem::replace(&mut self.writeback, wanted.written);
        if wanted.epoch != self.epoch {
            self.epoch = wanted.epoch;
            self.stop();
            self.running = wanted.start.map(Running::new);
            self.go();
            self.link.reach(self.epoch);
            return;
        }
        if wanted.calls_changed {
            self.set_calls(wanted.start);
        }
        if let Some(byte) = self.writeback.filter(|_| self.running.is_some() && self.writeback != before) {
            self.attempt(|connection| connection.set_writeback(byte));
        }
    }

    /// Does something with the connection if there is one, and gives it up if that fails.
    fn attempt<T>(&mut self, action: impl FnOnce(&mut Connection) -> Result<T, Error>) -> Option<T> {
        match action(self.connection.as_mut()?) {
            Ok(done) => Some(done),
            Err(error) => {
                self.disconnected(&error.to_string());
                None
            }
        }
    }

    /// Ends what the driver had started, and brings the configuration back to what it is at first.
    fn stop(&mut self) {
        let Some(running) = self.running.take() else { return };
        let config = self.attempt(|connection| {
            connection.stop(&running.start)?;
            connection.config()
        });
        if let Some(config) = config {
            self.show(config);
        }
    }

    /// Starts what the driver wants, or lets it go on.
    fn go(&mut self) {
        let Some(mut running) = self.running.take() else { return };
        let (memory, writeback) = (self.memory.clone(), self.writeback);
        let started = self.attempt(|connection| {
            connection.prepare(running.start.features, &memory)?;
            if let Some(byte) = writeback {
                connection.set_writeback(byte)?;
            }
            if connection.keeps_note() {
                if running.inflight.is_none() {
                    running.inflight = Some(connection.inflight(&running.start)?);
                }
                if let Some(inflight) = &running.inflight {
                    connection.set_inflight(inflight)?;
                }
            }
            let again = std::mem::replace(&mut running.begun, true);
            for (index, queue) in running.start.queues.iter().enumerate() {
                let Some(queue) = queue else { continue };
                connection.start(index, queue, &memory)?;
                if again {
                    // The backend may have gone between a kick and a look, or an answer and an interrupt.
                    queue.kick.write(1)?;
                    queue.call.write(1)?;
                }
            }
            Ok(())
        });
        if started.is_none() && self.connection.is_none() && running.begun {
            running.unanswered |= !rings::all_answered(&self.memory, &running.start);
        }
        self.running = Some(running);
    }

    fn set_calls(&mut self, start: Option<Arc<Start>>) {
        let (Some(running), Some(start)) = (&mut self.running, start) else { return };
        running.start = Arc::clone(&start);
        self.attempt(|connection| {
            let queues = start.queues.iter().enumerate();
            for (index, queue) in queues.filter_map(|(index, queue)| Some((index, queue.as_ref()?))) {
                connection.set_call(index, queue)?;
            }
            Ok(())
        });
    }

    /// Shows the guest a configuration space of the backend.
    fn show(&mut self, config: Vec<u8>) {
        let offer = Offer { features: 0, queues: 0, config };
        self.link.set_config(&block::config(&offer, self.queues));
    }

    /// The connection has ended.
    fn disconnected(&mut self, why: &str) {
        if self.connection.take().is_none() {
            return;
        }
        log::warn!(
            "{}: the connection to the backend has ended ({why}); looking for it",
            self.socket.display()
        );
        self.reasons.clear();
        self.retry = Instant::now();
        if let Some(running) = &mut self.running
            && running.begun
        {
            running.unanswered |= !rings::all_answered(&self.memory, &running.start);
        }
    }

    /// Looks for the backend once.
    fn reconnect(&mut self, handle: &Handle) {
        self.retry = Instant::now() + RETRY_INTERVAL;
        match self.try_reconnect(handle) {
            Ok(()) => {}
            Err(error @ Error::RequestsLost) => {
                self.lost = true;
                self.link.break_down();
                (self.report)(error);
            }
            Err(Error::Interrupted) => {}
            Err(error) => {
                let reason = error.to_string();
                if self.reasons.len() < REASONS_MAX && !self.reasons.contains(&reason) {
                    log::warn!("{}: {reason}", self.socket.display());
                    self.reasons.push(reason);
                }
            }
        }
    }

    fn try_reconnect(&mut self, handle: &Handle) -> Result<(), Error> {
        let (connection, offer) = Connection::open(&self.socket, &self.link, handle)?;
        self.check(&offer)?;
        if let Some(running) = &mut self.running
            && running.begun
            && !(running.inflight.is_some() && connection.keeps_note())
        {
            if running.unanswered {
                return Err(Error::RequestsLost);
            }
            running.inflight = None;
        }
        self.connection = Some(connection);
        self.show(offer.config);
        self.go();
        if self.connection.is_some() {
            log::info!("{}: the backend is there again", self.socket.display());
            if let Some(running) = &mut self.running {
                running.unanswered = false;
            }
        }
        Ok(())
    }

    /// Whether a backend is what the guest knows.
    fn check(&self, offer: &Offer) -> Result<(), Error> {
        if block::offered(offer, self.queues) & self.features != self.features {
            return Err(Error::Different("fewer features"));
        }
        if offer.queues < self.queues {
            return Err(Error::Different("fewer queues"));
        }
        if block::capacity(&offer.config) < block::capacity(&self.link.config()) {
            return Err(Error::Different("a smaller disk"));
        }
        Ok(())
    }

    /// Waits for an order, a notice, the end of the connection, or the time to look for the backend.
    fn wait(&mut self) {
        let wake = PollFd::from_borrowed_fd(borrow(self.link.wake_event()), PollFlags::IN);
        let Some(connection) = &self.connection else {
            let left = self.retry.saturating_duration_since(Instant::now());
            let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            // A signal: look again.
            let _ = poll(&mut [wake], if self.lost { None } else { Some(&timeout) });
            return;
        };
        let (stream, channel) = connection.watched();
        let mut fds = vec![wake, PollFd::from_borrowed_fd(stream.as_fd(), PollFlags::IN)];
        fds.extend(channel.map(|channel| PollFd::from_borrowed_fd(channel.as_fd(), PollFlags::IN)));
        if poll(&mut fds, None).is_err() {
            return;
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        if ready[1] {
            // Nothing was asked: it is the end, or a message that has no place here.
            return self.disconnected("it has closed the socket");
        }
        if ready.get(2) == Some(&true)
            && self.connection.as_mut().is_some_and(Connection::notices)
            && let Some(config) = self.attempt(Connection::config)
        {
            self.show(config);
        }
    }
}
