//! `sapwood top`, without a terminal.

use sapwood_tests::frontend::Command;

use crate::daemon::{Daemon, connect};
use crate::serve::Server;
use crate::store::{about, place};

const BLOCK: usize = 4096;

#[test]
fn top_shows_the_disks_of_a_server_and_of_a_daemon() {
    let place = place();
    about(&place, "create :web 8M").text();
    place.sapwood("create disk 8M").text();
    about(&place, "top vms --once").fails(1, &["no daemon serves the store"]);
    let (server, _) = Server::start(&place, "disk --control control");
    let shown = place.sapwood("top --control control --interval 1 --output=json").json();
    assert_eq!((shown[0]["name"].as_str(), &shown[0]["read"]["operations"]), (Some("disk"), &0.0.into()));
    place.sapwood("top --control control").fails(1, &["no terminal", "--once"]);
    server.stops();
    let (daemon, _) = Daemon::start(&place, "--store vms --no-background");
    about(&place, "attach :web --socket web.sock").text();
    let mut frontend = connect(&place, "web.sock");
    let (shown, written) = std::thread::scope(|scope| {
        let top = scope.spawn(|| place.sapwood("top vms --once --interval 1 --output=json").json());
        let mut written = 0;
        while !top.is_finished() {
            frontend.run(Command::Write(0, &[1; BLOCK])).unwrap();
            written += 1;
        }
        (top.join().unwrap(), written)
    });
    let seen = shown[0]["write"]["operations"].as_f64().unwrap();
    // A number that was read may differ from the one that was written in its last digit.
    let bytes = shown[0]["write"]["bytes"].as_f64().unwrap();
    assert!(seen > 0.0 && bytes >= seen * BLOCK as f64 * (1.0 - 1e-12), "{written}: {shown}");
    assert!(shown[0]["write"]["p50-us"].as_f64() <= shown[0]["write"]["p99-us"].as_f64(), "{shown}");
    let section = include_str!("../../../../docs/cli.md").split("\n## sapwood top\n").nth(1).unwrap();
    let said = shown.to_string();
    let fields = said.split('"').collect::<Vec<_>>();
    for pair in fields.windows(2).filter(|pair| pair[1].starts_with(':')) {
        assert!(section.contains(&format!("`{}`", pair[0])), "{} is not documented", pair[0]);
    }
    let text = place.sapwood("top vms --once --interval 1").text();
    assert!(text.starts_with("NAME") && text.contains("\nweb "), "{text}");
    daemon.stops();
}
