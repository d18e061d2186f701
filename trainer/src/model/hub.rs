//! Models by their id on the Hugging Face hub.
//!
//! Files land where huggingface_hub looks for them: `HF_HOME/hub/models--ORG--NAME/snapshots/COMMIT/FILE`, and `refs/main`
//! names the commit. They lie there as plain files, as huggingface_hub lays them where it has no symbolic links. Only what
//! is read here is fetched: configurations, the tokenizer, safetensors. The small files come first, so that a model that
//! cannot be used is refused before its weights are on their way.
//!
//! Of the environment, `HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT`, `HF_TOKEN`, `HF_TOKEN_PATH` and `HF_HUB_OFFLINE` are
//! honoured.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Deserialize;
use ureq::config::RedirectAuthHeaders;

use crate::config::Init;
use crate::model::Folder;
use crate::{Error, Result};

/// The folder of a model: `id_or_path` itself where it is a folder, else that of the model with this id on the hub, which is
/// fetched into the cache if need be.
///
/// # Errors
/// Neither a folder nor an id; no such model, or no right to it; no network and not in the cache; a model that
/// [`Folder::open`] refuses, or without safetensors.
pub fn resolve(id_or_path: &str) -> Result<PathBuf> {
    resolve_for(id_or_path, Init::Pretrained)
}

/// As [`resolve`]; where the weights are drawn from the seed, those of the hub are not fetched.
///
/// # Errors
/// As [`resolve`].
pub fn resolve_for(id_or_path: &str, init: Init) -> Result<PathBuf> {
    let path = Path::new(id_or_path);
    if path.is_dir() {
        return Ok(path.to_path_buf());
    }
    if !is_id(id_or_path) {
        let message = "no such model folder, and no id of the hub either, which is ORG/NAME";
        return Err(Error::file(path, message));
    }
    let hub = Hub::from_env(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))?;
    hub.fetch(id_or_path, init == Init::Pretrained)
}

/// `ORG/NAME` of letters, digits, `-`, `_` and `.`.
fn is_id(text: &str) -> bool {
    let valid = |part: &str| {
        part.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    text.split_once('/').is_some_and(|(org, name)| valid(org) && valid(name))
}

/// Attempts at one file; each goes on where the last one stopped.
const ATTEMPTS: u32 = 4;

/// Where models come from and where they are kept.
struct Hub {
    endpoint: String,
    cache: PathBuf,
    token: Option<String>,
    offline: bool,
    agent: ureq::Agent,
    /// Between two attempts.
    pause: Duration,
}

/// What the hub says of a model.
#[derive(Deserialize)]
struct Info {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

impl Hub {
    fn from_env(env: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let home = match env("HF_HOME") {
            Some(home) => PathBuf::from(home),
            None => match env("XDG_CACHE_HOME") {
                Some(cache) => PathBuf::from(cache).join("huggingface"),
                None => match env("HOME") {
                    Some(home) => PathBuf::from(home).join(".cache/huggingface"),
                    None => {
                        return Err(Error::Usage(
                            "neither HF_HOME nor HOME is set: no place for models".into(),
                        ));
                    }
                },
            },
        };
        let token = env("HF_TOKEN").or_else(|| {
            let path = env("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from);
            std::fs::read_to_string(path).ok()
        });
        let endpoint = env("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        let offline = env("HF_HUB_OFFLINE")
            .is_some_and(|value| ["1", "ON", "YES", "TRUE"].contains(&value.to_uppercase().as_str()));
        Ok(Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            cache: env("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from),
            token: token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty()),
            offline,
            agent: ureq::Agent::config_builder()
                .user_agent(concat!("lodestone/", env!("CARGO_PKG_VERSION")))
                // The hub redirects within itself before it hands over to its storage, which must not see the token.
                .redirect_auth_headers(RedirectAuthHeaders::SameHost)
                .timeout_connect(Some(Duration::from_secs(20)))
                .timeout_recv_response(Some(Duration::from_secs(60)))
                .build()
                .into(),
            pause: Duration::from_secs(1),
        })
    }

    /// The folder of model `id`, with its weights or without.
    fn fetch(&self, id: &str, weights: bool) -> Result<PathBuf> {
        let home = self.cache.join(format!("models--{}", id.replace('/', "--")));
        if self.offline {
            return cached(&home, weights).ok_or_else(|| {
                let message = format!(
                    "not a folder, and not whole in the cache {}, and HF_HUB_OFFLINE is set\nhint: give a folder, or fetch \
                     the model once without HF_HUB_OFFLINE",
                    home.display()
                );
                Error::file(id, message)
            });
        }
        let url = format!("{}/api/models/{id}/revision/main", self.endpoint);
        let info: Info = match self.get(&url, 0) {
            Ok(mut response) => serde_json::from_reader(response.body_mut().as_reader())
                .map_err(|error| Error::file(id, format!("{url}: unexpected answer: {error}")))?,
            Err(error) => {
                return match cached(&home, weights) {
                    Some(snapshot) if !is_status(&error) => {
                        tracing::warn!("{}: {error}; going on with {}", self.endpoint, snapshot.display());
                        Ok(snapshot)
                    }
                    _ => Err(self.refusal(id, &url, &error)),
                };
            }
        };
        if info.sha.is_empty() || !info.sha.chars().all(|c| c.is_ascii_alphanumeric()) {
            return Err(Error::file(id, format!("{url}: unexpected answer: commit {:?}", info.sha)));
        }
        let names: Vec<_> = info.siblings.iter().map(|sibling| sibling.rfilename.as_str()).collect();
        let wanted = Wanted::choose(id, &names, weights)?;

        let snapshot = home.join("snapshots").join(&info.sha);
        if wanted.small.iter().chain(&wanted.weights).all(|name| snapshot.join(name).exists()) {
            return Ok(snapshot);
        }
        create_dir_all(&snapshot)?;
        // Ranks of one node ask for the same model at once: the first fetches, the others find the files.
        let lock = home.join(".lock");
        let lock = File::create(&lock)
            .and_then(|file| file.lock().map(|()| file))
            .map_err(Error::io("lock", lock))?;
        for name in &wanted.small {
            self.file(id, &info.sha, name, &snapshot)?;
        }
        Folder::open(&snapshot)?;
        for name in &wanted.weights {
            self.file(id, &info.sha, name, &snapshot)?;
        }
        let refs = home.join("refs");
        create_dir_all(&refs)?;
        std::fs::write(refs.join("main"), &info.sha).map_err(Error::io("write", refs.join("main")))?;
        drop(lock);
        Ok(snapshot)
    }

    /// Fetches one file into the snapshot, unless it is there.
    fn file(&self, id: &str, sha: &str, name: &str, snapshot: &Path) -> Result<()> {
        let target = snapshot.join(name);
        if target.exists() {
            return Ok(());
        }
        let url = format!("{}/{id}/resolve/{sha}/{name}", self.endpoint);
        let partial = snapshot.join(format!("{name}.incomplete"));
        if let Some(parent) = target.parent() {
            create_dir_all(parent)?;
        }
        for attempt in 1.. {
            match self.transfer(id, &url, name, &partial) {
                Ok(()) => break,
                Err(Transfer::Final(error)) => return Err(error),
                Err(Transfer::Network(error)) if attempt == ATTEMPTS => {
                    return Err(self.refusal(id, &url, &error));
                }
                Err(Transfer::Network(error)) => {
                    tracing::warn!("{name}: {error}; trying again");
                    std::thread::sleep(self.pause * attempt);
                }
            }
        }
        std::fs::rename(&partial, &target).map_err(Error::io("rename", partial))
    }

    /// One attempt: appends to `partial` what it lacks.
    fn transfer(&self, id: &str, url: &str, name: &str, partial: &Path) -> std::result::Result<(), Transfer> {
        let mut file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(partial)
            .map_err(|error| Transfer::Final(Error::io("open", partial)(error)))?;
        let have = file.metadata().map_or(0, |metadata| metadata.len());
        let restart = |file: &File| {
            file.set_len(0).map_err(|error| Transfer::Final(Error::io("truncate", partial)(error)))
        };
        let mut response = match self.get(url, have) {
            Ok(response) => response,
            Err(ureq::Error::StatusCode(416)) if have > 0 => {
                restart(&file)?;
                self.get(url, 0).map_err(Transfer::Network)?
            }
            // Too many requests, or trouble at the other end: it may pass.
            Err(error @ ureq::Error::StatusCode(429 | 500..)) => return Err(Transfer::Network(error)),
            Err(error @ ureq::Error::StatusCode(_)) => {
                return Err(Transfer::Final(self.refusal(id, url, &error)));
            }
            Err(error) => return Err(Transfer::Network(error)),
        };
        let partly = response.status() == 206;
        if have > 0 && !partly {
            restart(&file)?;
        }
        let mut done = if partly { have } else { 0 };
        let total = response.body().content_length().map(|length| done + length);

        tracing::info!(
            "fetching {id}/{name}{}",
            total.map_or_else(String::new, |total| format!(", {}", size(total)))
        );
        let mut reader = response.body_mut().as_reader();
        let mut buffer = vec![0; 1 << 20];
        let mut told = Instant::now();
        loop {
            let count =
                reader.read(&mut buffer).map_err(|error| Transfer::Network(ureq::Error::Io(error)))?;
            if count == 0 {
                break;
            }
            file.write_all(&buffer[..count])
                .map_err(|error| Transfer::Final(Error::io("write", partial)(error)))?;
            done += count as u64;
            if told.elapsed() > Duration::from_secs(10) {
                told = Instant::now();
                tracing::info!("{name}: {} of {}", size(done), total.map_or_else(|| "?".into(), size));
            }
        }
        if total.is_some_and(|total| total != done) {
            let cut = std::io::Error::new(std::io::ErrorKind::UnexpectedEof, "the answer was cut short");
            return Err(Transfer::Network(ureq::Error::Io(cut)));
        }
        file.sync_all().map_err(|error| Transfer::Final(Error::io("write", partial)(error)))
    }

    /// GET from byte `start` on.
    fn get(
        &self,
        url: &str,
        start: u64,
    ) -> std::result::Result<ureq::http::Response<ureq::Body>, ureq::Error> {
        let mut request = self.agent.get(url);
        if start > 0 {
            request = request.header("Range", format!("bytes={start}-"));
        }
        if let Some(token) = &self.token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        request.call()
    }

    /// What to tell the user of a failed request.
    fn refusal(&self, id: &str, url: &str, error: &ureq::Error) -> Error {
        let host = &self.endpoint;
        let message = match error {
            // To somebody without a name the hub answers 401 also for what does not exist.
            ureq::Error::StatusCode(401 | 403) => {
                let known =
                    if self.token.is_some() { "it does not accept HF_TOKEN" } else { "HF_TOKEN is not set" };
                format!(
                    "no such folder, and {host} does not give it out ({error}; {known})\nhint: check the spelling; a private \
                     or gated model needs the token of an account that may read it, in HF_TOKEN"
                )
            }
            ureq::Error::StatusCode(404) => {
                format!(
                    "no such folder, and no such model or file on {host}: {url}\nhint: check the spelling"
                )
            }
            ureq::Error::StatusCode(_) => format!("{url}: {error}\nhint: try again later"),
            _ => format!(
                "no such folder, and {host} cannot be reached: {error}\nhint: give the path of a folder, or check the network, \
                 HF_ENDPOINT and HTTPS_PROXY"
            ),
        };
        Error::file(id, message)
    }
}

/// Why an attempt failed.
enum Transfer {
    /// Another attempt may succeed.
    Network(ureq::Error),
    Final(Error),
}

/// The files of a model that are read here.
#[derive(Debug, PartialEq)]
struct Wanted<'a> {
    small: Vec<&'a str>,
    weights: Vec<&'a str>,
}

impl<'a> Wanted<'a> {
    fn choose(id: &str, names: &[&'a str], weights: bool) -> Result<Self> {
        let small = names.iter().copied().filter(|name| is_small(name)).collect();
        if !weights {
            return Ok(Self { small, weights: Vec::new() });
        }
        let mut weights: Vec<_> = names.iter().copied().filter(|name| is_weights(name)).collect();
        // A whole file beside its own shards.
        if weights.contains(&"model.safetensors") {
            weights.retain(|name| !name.starts_with("model-"));
        }
        if weights.is_empty() {
            let found = match names.iter().find(|name| name.ends_with(".bin") || name.ends_with(".pt")) {
                Some(name) => format!("its weights are pickled ({name}), which is not read"),
                None => "it has no weights".into(),
            };
            return Err(Error::file(id, format!("{found}, expected model.safetensors")));
        }
        Ok(Self { small, weights })
    }
}

/// A configuration or a tokenizer file of the model itself, not of another format's copy in a folder of its own.
fn is_small(name: &str) -> bool {
    match name.split_once('/') {
        None => {
            let sentence = name.starts_with("sentence_") && name.ends_with("_config.json");
            sentence
                || [
                    "config.json",
                    "modules.json",
                    "config_sentence_transformers.json",
                    "adapter_config.json",
                    "model.safetensors.index.json",
                    "tokenizer.json",
                    "tokenizer_config.json",
                    "special_tokens_map.json",
                    "added_tokens.json",
                    "vocab.txt",
                    "vocab.json",
                    "merges.txt",
                    "tokenizer.model",
                    "sentencepiece.bpe.model",
                    "spiece.model",
                ]
                .contains(&name)
        }
        Some((module, file)) => {
            file == "config.json"
                && module.starts_with(|c: char| c.is_ascii_digit())
                && module.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
        }
    }
}

/// `model.safetensors`, a shard `model-00001-of-00002.safetensors`, or an adapter.
fn is_weights(name: &str) -> bool {
    let shard = || name.strip_prefix("model-")?.strip_suffix(".safetensors")?.split_once("-of-");
    let digits = |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_digit());
    ["model.safetensors", "adapter_model.safetensors"].contains(&name)
        || shard().is_some_and(|(number, count)| digits(number) && digits(count))
}

/// The snapshot that `refs/main` names, if it is whole: with its weights, where they are needed.
fn cached(home: &Path, weights: bool) -> Option<PathBuf> {
    let sha = std::fs::read_to_string(home.join("refs/main")).ok()?;
    let snapshot = home.join("snapshots").join(sha.trim());
    let whole = !weights
        || ["model.safetensors", "adapter_model.safetensors"].iter().any(|name| snapshot.join(name).exists())
        || shards(&snapshot).is_some_and(|names| names.iter().all(|name| snapshot.join(name).exists()));
    (whole && Folder::open(&snapshot).is_ok()).then_some(snapshot)
}

/// The files that an index of shards names.
fn shards(snapshot: &Path) -> Option<Vec<String>> {
    let index = std::fs::read(snapshot.join("model.safetensors.index.json")).ok()?;
    let index: serde_json::Value = serde_json::from_slice(&index).ok()?;
    index.get("weight_map")?.as_object()?.values().map(|name| name.as_str().map(String::from)).collect()
}

fn is_status(error: &ureq::Error) -> bool {
    matches!(error, ureq::Error::StatusCode(_))
}

fn create_dir_all(path: &Path) -> Result<()> {
    std::fs::create_dir_all(path).map_err(Error::io("create", path))
}

/// `90.9 MB`.
fn size(bytes: u64) -> String {
    match bytes {
        0..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::{BufRead, BufReader};
    use std::net::TcpListener;
    use std::sync::{Arc, Mutex};

    use super::*;

    /// How the server answers one path.
    #[derive(Clone)]
    enum Answer {
        Body(Vec<u8>),
        Redirect(String),
        Status(u16),
        /// Says the whole length, sends this many bytes and hangs up; the next time, answers as it should.
        CutOnce(usize, Vec<u8>),
    }

    /// A hub on a local port: routes by path, and the requests as they came (path, Range, Authorization).
    struct Server {
        endpoint: String,
        seen: Arc<Mutex<Vec<(String, String, String)>>>,
    }

    impl Server {
        fn start(routes: &[(&str, Answer)]) -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let endpoint = format!("http://{}", listener.local_addr().unwrap());
            let mut routes: BTreeMap<_, _> =
                routes.iter().map(|(path, answer)| ((*path).to_string(), answer.clone())).collect();
            let seen = Arc::new(Mutex::new(Vec::new()));
            let log = seen.clone();
            std::thread::spawn(move || {
                for stream in listener.incoming() {
                    let mut stream = stream.unwrap();
                    let (mut path, mut range, mut token) = (String::new(), String::new(), String::new());
                    for line in BufReader::new(stream.try_clone().unwrap()).lines() {
                        let line = line.unwrap();
                        if line.is_empty() {
                            break;
                        }
                        if let Some(rest) = line.strip_prefix("GET ") {
                            path = rest.split(' ').next().unwrap().into();
                        } else if let Some((name, value)) = line.split_once(": ") {
                            match name.to_lowercase().as_str() {
                                "range" => range = value.into(),
                                "authorization" => token = value.into(),
                                _ => (),
                            }
                        }
                    }
                    log.lock().unwrap().push((path.clone(), range.clone(), token));
                    let start: usize = range
                        .strip_prefix("bytes=")
                        .map_or(0, |range| range.trim_end_matches('-').parse().unwrap());
                    let answer = routes.get(&path).cloned().unwrap_or(Answer::Status(404));
                    let (head, body) = match answer {
                        Answer::Body(body) if start > 0 => (
                            format!(
                                "206 Partial Content\r\nContent-Range: bytes {start}-{}/{}",
                                body.len() - 1,
                                body.len()
                            ),
                            body[start..].to_vec(),
                        ),
                        Answer::Body(body) => ("200 OK".into(), body),
                        Answer::Redirect(to) => (format!("302 Found\r\nLocation: {to}"), vec![]),
                        Answer::Status(status) => (format!("{status} Refused"), b"no".to_vec()),
                        Answer::CutOnce(count, body) => {
                            let head = format!(
                                "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
                                body.len()
                            );
                            stream.write_all(head.as_bytes()).unwrap();
                            stream.write_all(&body[..count]).unwrap();
                            routes.insert(path, Answer::Body(body));
                            continue;
                        }
                    };
                    let length = body.len();
                    let head =
                        format!("HTTP/1.1 {head}\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n");
                    stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body)).ok();
                }
            });
            Self { endpoint, seen }
        }

        fn paths(&self) -> Vec<String> {
            self.seen.lock().unwrap().iter().map(|(path, ..)| path.clone()).collect()
        }
    }

    fn hub(endpoint: &str, home: &Path, more: &[(&str, &str)]) -> Hub {
        let more: BTreeMap<_, _> = more.iter().copied().collect();
        let hub = Hub::from_env(|name| match name {
            "HF_HOME" => Some(home.display().to_string()),
            "HF_ENDPOINT" => Some(endpoint.into()),
            _ => more.get(name).map(|value| (*value).to_string()),
        });
        Hub { pause: Duration::ZERO, ..hub.unwrap() }
    }

    fn body(text: &str) -> Answer {
        Answer::Body(text.into())
    }

    fn listing(names: &[&str]) -> Answer {
        let siblings: Vec<_> = names.iter().map(|name| serde_json::json!({"rfilename": name})).collect();
        body(&serde_json::json!({"id": "org/name", "sha": "abc123", "siblings": siblings}).to_string())
    }

    const API: &str = "/api/models/org/name/revision/main";

    fn model() -> Vec<(&'static str, Answer)> {
        vec![
            (
                API,
                listing(&[
                    ".gitattributes",
                    "config.json",
                    "modules.json",
                    "1_Pooling/config.json",
                    "tokenizer.json",
                    "model.safetensors",
                    "pytorch_model.bin",
                    "onnx/model.onnx",
                    "onnx/config.json",
                ]),
            ),
            (
                "/org/name/resolve/abc123/config.json",
                Answer::Redirect("/api/resolve-cache/config.json".into()),
            ),
            ("/api/resolve-cache/config.json", body("{}")),
            (
                "/org/name/resolve/abc123/modules.json",
                body(
                    r#"[{"path": "", "type": "sentence_transformers.models.Transformer"},
                        {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]"#,
                ),
            ),
            ("/org/name/resolve/abc123/1_Pooling/config.json", body(r#"{"pooling_mode_cls_token": true}"#)),
            ("/org/name/resolve/abc123/tokenizer.json", body("{}")),
            ("/org/name/resolve/abc123/model.safetensors", body("weights")),
        ]
    }

    #[test]
    fn what_is_needed_lands_in_the_cache_and_serves_offline() {
        let server = Server::start(&model());
        let home = tempfile::tempdir().unwrap();
        let online = hub(&server.endpoint, home.path(), &[("HF_TOKEN", "secret")]);
        let snapshot = online.fetch("org/name", true).unwrap();
        assert_eq!(snapshot, home.path().join("hub/models--org--name/snapshots/abc123"));
        assert_eq!(std::fs::read(snapshot.join("model.safetensors")).unwrap(), b"weights");
        assert!(snapshot.join("1_Pooling/config.json").exists());
        assert!(!snapshot.join("pytorch_model.bin").exists() && !snapshot.join("onnx").exists());
        assert_eq!(std::fs::read_to_string(snapshot.join("../../refs/main")).unwrap(), "abc123");
        let seen = server.seen.lock().unwrap().clone();
        assert!(seen.iter().all(|(.., token)| token == "Bearer secret"), "{seen:?}");
        assert_eq!(seen.last().unwrap().0, "/org/name/resolve/abc123/model.safetensors");

        // A second time only the listing is asked for.
        assert_eq!(online.fetch("org/name", true).unwrap(), snapshot);
        assert_eq!(server.paths().len(), seen.len() + 1);

        let offline = hub("http://127.0.0.1:1", home.path(), &[("HF_HUB_OFFLINE", "1")]);
        assert_eq!(offline.fetch("org/name", true).unwrap(), snapshot);
        let error = offline.fetch("org/other", true).unwrap_err().to_string();
        assert!(error.contains("org/other: not a folder") && error.contains("HF_HUB_OFFLINE"), "{error}");

        // Without a network the cache serves too.
        let unreachable = hub("http://127.0.0.1:1", home.path(), &[]);
        assert_eq!(unreachable.fetch("org/name", true).unwrap(), snapshot);
        let error = unreachable.fetch("org/other", true).unwrap_err().to_string();
        assert!(error.contains("cannot be reached") && error.contains("hint"), "{error}");
    }

    #[test]
    fn weights_that_are_drawn_are_not_fetched() {
        let server = Server::start(&model());
        let home = tempfile::tempdir().unwrap();
        let snapshot = hub(&server.endpoint, home.path(), &[]).fetch("org/name", false).unwrap();
        assert!(snapshot.join("config.json").exists() && !snapshot.join("model.safetensors").exists());
        let offline = hub("http://127.0.0.1:1", home.path(), &[("HF_HUB_OFFLINE", "true")]);
        assert_eq!(offline.fetch("org/name", false).unwrap(), snapshot);
        assert!(offline.fetch("org/name", true).is_err());
    }

    #[test]
    fn a_download_cut_short_goes_on_where_it_stopped() {
        let weights: Vec<u8> = (0..100_000_u32).map(|i| i as u8).collect();
        let mut routes = model();
        routes.pop();
        routes.push(("/org/name/resolve/abc123/model.safetensors", Answer::CutOnce(70_000, weights.clone())));
        let server = Server::start(&routes);
        let home = tempfile::tempdir().unwrap();
        let snapshot = hub(&server.endpoint, home.path(), &[]).fetch("org/name", true).unwrap();
        assert_eq!(std::fs::read(snapshot.join("model.safetensors")).unwrap(), weights);
        let seen = server.seen.lock().unwrap().clone();
        let (.., range, _) = seen.last().unwrap();
        assert_eq!(range, "bytes=70000-");
        assert!(!snapshot.join("model.safetensors.incomplete").exists());
    }

    #[test]
    fn refusals_say_what_to_do() {
        let cases: &[(Answer, &str, &str)] = &[
            (Answer::Status(404), "", "no such model or file"),
            (Answer::Status(401), "", "HF_TOKEN is not set"),
            (Answer::Status(403), "secret", "does not accept HF_TOKEN"),
            (Answer::Status(503), "", "try again later"),
            (body("<html>"), "", "unexpected answer"),
            (listing(&["config.json", "pytorch_model.bin"]), "", "pickled (pytorch_model.bin)"),
            (listing(&["config.json"]), "", "it has no weights"),
        ];
        for (answer, token, expected) in cases {
            let server = Server::start(&[(API, answer.clone())]);
            let home = tempfile::tempdir().unwrap();
            let error = hub(&server.endpoint, home.path(), &[("HF_TOKEN", token)])
                .fetch("org/name", true)
                .unwrap_err();
            let error = error.to_string();
            assert!(
                error.starts_with("org/name: ") && error.contains(expected),
                "expected {expected:?} in {error:?}"
            );
        }
    }

    #[test]
    fn a_model_that_cannot_be_used_is_refused_before_its_weights() {
        let mut routes = model();
        routes.push((
            "/org/name/resolve/abc123/modules.json",
            body(r#"[{"path": "", "type": "sentence_transformers.models.LSTM"}]"#),
        ));
        let server = Server::start(&routes);
        let home = tempfile::tempdir().unwrap();
        let error = hub(&server.endpoint, home.path(), &[]).fetch("org/name", true).unwrap_err().to_string();
        assert!(error.contains("module LSTM is not supported"), "{error}");
        assert!(!server.paths().iter().any(|path| path.ends_with(".safetensors")));
    }

    #[test]
    fn folders_are_taken_as_they_are_and_nonsense_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(resolve(folder.path().to_str().unwrap()).unwrap(), folder.path());
        for text in ["no-such", "./no/such", "/no/such", "a/b/c", "../x", "org/", "org/na me", ""] {
            let error = resolve(text).unwrap_err().to_string();
            assert!(error.contains("no id of the hub either"), "{text:?}: {error}");
        }
    }

    #[test]
    fn shards_are_taken_only_without_a_whole_file() {
        let shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
        let names = [
            shards[0],
            shards[1],
            "model.safetensors.index.json",
            "consolidated.safetensors",
            "model-fp16.safetensors",
        ];
        assert_eq!(Wanted::choose("", &names, true).unwrap().weights, shards);
        assert_eq!(Wanted::choose("", &names, true).unwrap().small, ["model.safetensors.index.json"]);
        let both = [shards[0], shards[1], "model.safetensors"];
        assert_eq!(Wanted::choose("", &both, true).unwrap().weights, ["model.safetensors"]);
    }
}
