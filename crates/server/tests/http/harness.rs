//! A server on a free port, and a client that shows statuses instead of hiding them.

use hearth_data::{ChatTemplate, Tokenizer};
use hearth_engine::{Activations, Engine, EngineConfig, EngineHandle, LoadedModel};
use hearth_memory::{Budget, Ledger};
use hearth_server::{AppState, ServeError, ServerConfig, Service, serve};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

pub const MODEL: &str = "tiny/chat";

pub fn model_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny-chat/model")
}

/// `reference.json` of the fixture.
pub fn reference() -> Value {
    let path = model_folder().join("../reference.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

pub fn tokenizer() -> Tokenizer {
    Tokenizer::from_file(model_folder().join("tokenizer.json")).unwrap()
}

pub fn engine(config: EngineConfig) -> EngineHandle {
    let files = hearth_weights::open(&model_folder()).unwrap();
    let ledger = Ledger::new(Budget::default());
    let model = LoadedModel::load(&files, Activations::Int8, &ledger, &|_| {}).unwrap();
    Engine::start(model, config).unwrap()
}

/// The tiny chat model with everything it has.
pub fn service(engine: EngineHandle) -> Service {
    let tokenizer = tokenizer();
    let source = std::fs::read_to_string(model_folder().join("chat_template.jinja")).unwrap();
    let (bos, eos) = (tokenizer.bos_token(), tokenizer.eos_token());
    let template = ChatTemplate::new(&source, bos.as_deref(), eos.as_deref()).unwrap();
    let eos_tokens = tokenizer.eos_id().into_iter().collect();
    Service { engine, tokenizer: Some(tokenizer), template: Some(template), eos_tokens, adapters: Vec::new() }
}

/// A running server.
pub struct Server {
    pub address: SocketAddr,
    pub state: AppState,
    runtime: Runtime,
    shutdown: Option<oneshot::Sender<()>>,
    end: Option<JoinHandle<Result<(), ServeError>>>,
}

impl Server {
    /// Listens without a model.
    pub fn loading(config: ServerConfig) -> Self {
        let runtime = Runtime::new().unwrap();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let state = AppState::new(config);
        let (shutdown, signal) = oneshot::channel();
        let end = runtime.spawn(serve(listener, state.clone(), async {
            signal.await.ok();
        }));
        Self { address, state, runtime, shutdown: Some(shutdown), end: Some(end) }
    }

    pub fn start(config: ServerConfig, service: Service) -> Self {
        let server = Self::loading(config);
        server.state.ready(service);
        server
    }

    /// With default settings, for tests that leave nothing behind.
    pub fn shared() -> &'static Self {
        static SERVER: OnceLock<Server> = OnceLock::new();
        SERVER.get_or_init(|| Self::start(ServerConfig::new(MODEL), service(engine(EngineConfig::default()))))
    }

    pub fn begin_shutdown(&mut self) {
        self.shutdown.take().unwrap().send(()).unwrap();
    }

    /// How `serve` ended.
    pub fn wait(&mut self) -> Result<(), ServeError> {
        let end = self.end.take().unwrap();
        self.runtime.block_on(end).unwrap()
    }

    pub fn get(&self, path: &str) -> Answer {
        Answer::of(client().get(self.url(path)).call().unwrap())
    }

    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.post_text(path, &body.to_string())
    }

    pub fn post_text(&self, path: &str, body: &str) -> Answer {
        Answer::of(client().post(self.url(path)).content_type("application/json").send(body).unwrap())
    }

    /// Posts and expects 200.
    pub fn ok(&self, path: &str, body: &Value) -> Value {
        let answer = self.post(path, body);
        assert_eq!(answer.status, 200, "{body}: {}", answer.text);
        answer.json()
    }

    /// Posts a streaming request and gives its chunks; checks what every stream must keep to.
    pub fn stream(&self, path: &str, body: &Value) -> Vec<Value> {
        let mut body = body.clone();
        body["stream"] = true.into();
        let answer = self.post(path, &body);
        assert_eq!(answer.status, 200, "{}", answer.text);
        assert_eq!(answer.header("content-type"), "text/event-stream");
        let events: Vec<&str> = answer.text.split_terminator("\n\n").collect();
        let (last, chunks) = events.split_last().unwrap();
        assert_eq!(*last, "data: [DONE]");
        let parse = |event: &&str| {
            let data = event.strip_prefix("data: ").unwrap_or_else(|| panic!("{event:?}"));
            serde_json::from_str(data).unwrap_or_else(|e| panic!("{event:?}: {e}"))
        };
        chunks.iter().map(parse).collect()
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// Posts over a bare connection and returns it with the answer unread.
    pub fn connect(&self, path: &str, body: &Value) -> TcpStream {
        let body = body.to_string();
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let head = format!("POST {path} HTTP/1.1\r\nhost: test\r\ncontent-length: {}\r\n\r\n", body.len());
        stream.write_all((head + &body).as_bytes()).unwrap();
        stream
    }
}

/// Reads until a line begins with `data: `.
pub fn first_event(stream: &TcpStream) -> String {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    while !line.starts_with("data: ") {
        line.clear();
        assert!(reader.read_line(&mut line).unwrap() > 0, "the connection ended");
    }
    line
}

/// Reads until the server closes.
pub fn rest(mut stream: TcpStream) -> String {
    let mut out = Vec::new();
    stream.read_to_end(&mut out).unwrap();
    String::from_utf8_lossy(&out).into_owned()
}

/// Waits for something that is to come about by itself.
pub fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(30), "never came about: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A request that takes the tiny model long enough to be caught in the act.
pub fn long_request() -> Value {
    serde_json::json!({"prompt": [5, 6, 7], "n": 128, "max_tokens": 500, "ignore_eos": true, "stream": true})
}

/// Tokens that [`long_request`] would generate.
pub const LONG_TOKENS: u64 = 128 * 500;

pub fn client() -> ureq::Agent {
    ureq::Agent::config_builder().http_status_as_error(false).build().into()
}

/// What came back.
pub struct Answer {
    pub status: u16,
    pub headers: ureq::http::HeaderMap,
    pub text: String,
}

impl Answer {
    pub fn of(mut response: ureq::http::Response<ureq::Body>) -> Self {
        Self {
            status: response.status().as_u16(),
            headers: response.headers().clone(),
            text: response.body_mut().read_to_string().unwrap(),
        }
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|e| panic!("{:?}: {e}", self.text))
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |v| v.to_str().unwrap())
    }
}
