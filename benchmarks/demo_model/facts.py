"""Questions about Millrace itself, answered from its documentation."""

import random
from itertools import chain

from benchmarks.demo_model.sample import Sample, user

# Subject: what it is or does.
DEFINITIONS = {
    "Millrace": "Millrace serves ERNIE-4.5-VL-28B-A3B-Thinking as four services over Redis Streams.",
    "the gateway": "The gateway speaks HTTP: it checks requests, renders the prompt and streams the answer.",
    "mm_encoder": "mm_encoder turns images and videos into embeddings.",
    "the engine": "The engine runs the language model: it schedules, computes and samples tokens.",
    "postproc": "postproc turns tokens into text, reasoning and tool calls.",
    "the vision tower": "The vision tower turns the patches of a picture into features.",
    "the resampler": "The resampler merges 2 x 2 patches, and two frames of a video, into one token.",
    "the stream encode": "The stream encode carries requests with media from the gateway to mm_encoder.",
    "the stream generate": "The stream generate carries requests to the engine.",
    "the tokens stream": "The tokens stream carries each step's new tokens from the engine to postproc.",
    "the deltas stream": "The deltas stream carries new text from postproc to one gateway.",
    "the control stream": "The control stream broadcasts cancellations and other news to every replica.",
    "the journal": "The journal is a request's generated token ids, kept in Redis by postproc.",
    "the record": "The record of a request holds what it asked for, its epoch and how it ended.",
    "an epoch": "An epoch is raised by each engine that takes a request, so that older writers are ignored.",
    "a lease": "A lease says that a replica lives; when it expires the replica counts as dead.",
    "a shard": "A shard is a part of the tokens stream, owned by one postproc.",
    "a blob": "A blob is a picture or its embeddings, stored in Redis in chunks of about 1 MB.",
    "the quarantine": "The quarantine keeps requests that took down replica after replica, for people to look at.",
    "the prefix cache": "The prefix cache shares the blocks of prompts that begin alike.",
    "chunked prefill": "Chunked prefill computes a long prompt in several steps, beside the others.",
    "the scheduler": "The scheduler plans each step of the engine over all sequences.",
    "the sampler": "The sampler draws the next token of each sequence.",
    "the outbox": "The outbox sends one message of tokens per step, without making the model wait.",
    "the mailbox": "The mailbox brings new work into the thread of the model.",
    "the block pool": "The block pool hands out the pages of the KV cache.",
    "the detokenizer": "The detokenizer turns token ids into text as they come.",
    "the reasoning parser": "The reasoning parser splits what is thought from what is said.",
    "the tool parser": "The tool parser finds tool calls in the answer and turns them into JSON.",
    "the chat template": "The chat template writes a conversation as the text that the model was trained on.",
    "the shield": "The shield makes sure that what a client writes never becomes a control token.",
    "millrace serve": "millrace serve runs Redis and the four services on one machine.",
    "millrace top": "millrace top watches a running pipeline live: stages, replicas, streams and Redis.",
    "millrace status": "millrace status prints once, as text or JSON, whether all is well.",
    "millrace quarantine": "millrace quarantine lists, shows, retries or drops requests that crashed replicas.",
    "millrace autoscale": "millrace autoscale scales a deployment on Kubernetes by the work that waits.",
    "the console": "The console is a web page with a chat and a live view of the pipeline.",
    "the autoscaler": "The autoscaler adds and removes replicas by the work that waits in the streams.",
    "the Helm chart": "The Helm chart installs Millrace on Kubernetes.",
    "a mill race": "A mill race is the channel that leads water to the wheel of a mill.",
    "wint8": "wint8 stores weights as 8-bit integers with a scale for each row.",
    "wint4": "wint4 stores weights as 4-bit integers with scales.",
    "a consumer group": "A consumer group shares the entries of a stream among replicas, each entry to one.",
    "back-pressure": "Back-pressure means that a full stage makes the stages before it wait.",
    "single-flight": "Single-flight means that of all replicas one encodes a picture and the others wait for it.",
    "a thinking budget": "A thinking budget limits the tokens of reasoning; after that thinking is closed.",
    "an expert": "An expert is one of many small networks in a layer; a router picks a few for each token.",
    "the router": "The router picks the experts for each token, with a bias that keeps their load even.",
    "a vision expert": "A vision expert works on the tokens of pictures only; text has experts of its own.",
    "a shared expert": "A shared expert works on every token, whatever its kind.",
    "the demo model": "The demo model is a small checkpoint of the same architecture, trained on generated questions.",
    "the idempotency key": "With an Idempotency-Key a repeated request gets the first one's answer and starts nothing.",
    "Last-Event-ID": "Last-Event-ID says which event was seen last, so that a stream goes on after it.",
    "ERNIE": "ERNIE is a family of models by Baidu; Millrace serves ERNIE-4.5-VL-28B-A3B-Thinking.",
    "Redis": "Redis is the only transport between the services: streams, records, blobs and leases.",
    "the namespace": "The namespace is a prefix of all keys, so that several deployments can share a Redis.",
}
WHAT = (
    "What is {}?",
    "What does {} do?",
    "What is {} for?",
    "Tell me about {}.",
    "Explain {}.",
    "What is the purpose of {}?",
    "Can you explain {}?",
    "Describe {}.",
    "What do you know about {}?",
    "What is meant by {}?",
    "Why is there {}?",
    "Define {}.",
    "I want to know what {} is.",
    "What role does {} play?",
    "{}: what is that?",
)

# Setting: its default, and the service that has it.
SETTINGS = {
    "port": ("8180", "the gateway"),
    "max_concurrency": ("512", "the gateway"),
    "max_n": ("8", "the gateway"),
    "max_body_bytes": ("128 MiB", "the gateway"),
    "max_media_bytes": ("64 MiB", "the gateway"),
    "body_timeout_s": ("60 seconds", "the gateway"),
    "request_timeout_s": ("600 seconds", "the gateway"),
    "max_queue": ("4096", "the gateway"),
    "submit_timeout_s": ("10 seconds", "the gateway"),
    "retain_s": ("60 seconds", "the gateway"),
    "watch_s": ("3 seconds", "the gateway"),
    "keep_alive_s": ("10 seconds", "the gateway"),
    "max_pending_bytes": ("1 MiB", "the gateway"),
    "tower_max_patches": ("32768", "mm_encoder"),
    "preprocess_threads": ("2", "mm_encoder"),
    "media_max_bytes": ("256 MiB", "mm_encoder"),
    "media_request_max_bytes": ("512 MiB", "mm_encoder"),
    "media_max_pixels": ("64 million", "mm_encoder"),
    "media_timeout_s": ("30 seconds", "mm_encoder"),
    "media_max_redirects": ("5", "mm_encoder"),
    "video_max_seconds": ("3600 seconds", "mm_encoder"),
    "video_decode_s": ("120 seconds", "mm_encoder"),
    "quantization": ("none", "the engine"),
    "max_num_seqs": ("32", "the engine"),
    "max_num_batched_tokens": ("8192", "the engine"),
    "enable_chunked_prefill": ("true", "the engine"),
    "enable_prefix_caching": ("true", "the engine"),
    "block_size": ("64", "the engine"),
    "gpu_memory_utilization": ("0.9", "the engine"),
    "kv_cache_bytes": ("1 GiB", "the engine"),
    "journal_every": ("64 tokens", "postproc"),
    "read_count": ("128 steps", "postproc"),
    "trim_every": ("256 steps", "postproc"),
    "deltas_max_len": ("10000", "postproc"),
    "lease_ms": ("3000 milliseconds", "every service"),
    "drain_s": ("30 seconds", "every service"),
    "max_deliveries": ("3", "every service"),
    "shards": ("1", "every service"),
    "max_model_len": ("32768", "every service"),
    "blob_ttl_s": ("3600 seconds", "every service"),
    "blob_budget_bytes": ("4 GiB", "every service"),
    "log_level": ("info", "every service"),
    "trace_ratio": ("1", "every service"),
}
DEFAULT = (
    "What is the default of {}?",
    "What is {} by default?",
    "Which default does {} have?",
    "What is the default value of {}?",
    "How large is {} if I do not set it?",
    "What value has {} unless I change it?",
    "Default of {}?",
    "Tell me the default of {}.",
)
WHOSE = (
    "Which service has the setting {}?",
    "Whose setting is {}?",
    "Which service reads {}?",
    "Where do I set {}?",
    "To which service does {} belong?",
)

STATUSES = {
    "400": "the request can never work; param names the field",
    "401": "the API key is missing or wrong",
    "404": "there is no such request or model",
    "408": "the body did not arrive in time",
    "409": "the idempotency key was used for something else",
    "413": "the request is too large",
    "429": "too many requests are open or waiting",
    "500": "it is the server's fault",
    "503": "Redis does not answer, or the gateway is shutting down",
    "504": "the deadline has passed",
}
MEANS = (
    "What does status {} mean?",
    "What does a {} mean?",
    "Why do I get a {}?",
    "I got status {}. Why?",
    "Explain the status {}.",
    "When does Millrace answer {}?",
    "The server says {}. What is wrong?",
    "What is error {}?",
)

# Answer: ways to ask for it.
QUESTIONS = {
    "Run make serve; it listens on port 8180.": (
        "How do I start Millrace?",
        "How can I run it?",
        "How do I start the server?",
        "What do I type to run Millrace?",
        "How do I launch the demo?",
        "How do I get it running?",
    ),
    "Run make test.": (
        "How do I run the tests?",
        "Which command runs the tests?",
        "How can I test it?",
        "How are the tests started?",
    ),
    "Press Ctrl-C; it stops in order.": (
        "How do I stop Millrace?",
        "How do I end the server?",
        "How can I stop it?",
        "How is it shut down?",
    ),
    "Millrace has four services: gateway, mm_encoder, engine and postproc.": (
        "How many services does Millrace have?",
        "Which services are there?",
        "What are the services of Millrace?",
        "Name the four services.",
        "What parts is Millrace made of?",
        "List the services.",
    ),
    "The gateway listens on port 8180.": (
        "Which port does Millrace use?",
        "On which port does it listen?",
        "What is the port of the server?",
        "Where can I reach the API?",
    ),
    "Metrics are on port 8181.": (
        "Where are the metrics?",
        "On which port are the metrics?",
        "What is the metrics port?",
        "Where does Prometheus find metrics?",
    ),
    "Python 3.11.": (
        "Which Python do I need?",
        "Which version of Python does Millrace need?",
        "What Python version is required?",
        "Does it need a certain Python?",
    ),
    "No, it runs on a CPU too, with the demo model.": (
        "Do I need a GPU?",
        "Does Millrace need a GPU?",
        "Can it run without a GPU?",
        "Does it work on a laptop?",
        "Can I run it on a CPU?",
    ),
    "Millrace serves ERNIE-4.5-VL-28B-A3B-Thinking.": (
        "Which model does Millrace serve?",
        "What model is it made for?",
        "Which models can it serve?",
        "For which model was Millrace built?",
    ),
    "Its requests go on: another replica claims the entry and continues after the tokens in the journal.": (
        "What happens if an engine dies?",
        "What if the engine crashes?",
        "What happens when an engine is killed?",
        "Are tokens lost when an engine dies?",
        "What becomes of requests when an engine goes down?",
    ),
    "The client comes back to any gateway with Last-Event-ID and gets the rest.": (
        "What happens if a gateway dies?",
        "What if the gateway crashes?",
        "How does a client go on when its gateway died?",
        "What happens when a gateway is killed?",
    ),
    "Another postproc takes over its shards and replays the tokens stream.": (
        "What happens if postproc dies?",
        "What if postproc crashes?",
        "What happens when a postproc is killed?",
        "Who takes over when postproc goes down?",
    ),
    "All services wait and go on when it is back; new requests get a 503 meanwhile.": (
        "What happens if Redis dies?",
        "What if Redis is down?",
        "What happens when Redis is killed?",
        "What do the services do without Redis?",
    ),
    "The gateway writes it and mm_encoder reads it.": (
        "Who writes the stream encode?",
        "Who reads encode?",
        "Which services use the stream encode?",
        "Who uses encode?",
    ),
    "The gateway and mm_encoder write it and the engine reads it.": (
        "Who writes the stream generate?",
        "Who reads generate?",
        "Which services use the stream generate?",
        "Who uses generate?",
    ),
    "The engine writes it and postproc reads it.": (
        "Who writes the tokens stream?",
        "Who reads the tokens stream?",
        "Which services use the tokens stream?",
        "Where do tokens go after the engine?",
    ),
    "postproc writes it and one gateway reads it.": (
        "Who writes the deltas stream?",
        "Who reads the deltas stream?",
        "Which services use the deltas stream?",
        "Where does the text go after postproc?",
    ),
    "Only mm_encoder and the engine import torch.": (
        "Which services import torch?",
        "Who needs torch?",
        "Does the gateway import torch?",
        "Which services need PyTorch?",
    ),
    "Send enable_thinking false.": (
        "How do I turn thinking off?",
        "How can I switch off the reasoning?",
        "How do I get an answer without thinking?",
        "Can thinking be disabled?",
        "How do I disable reasoning?",
    ),
    'Send "stream": true.': (
        "How do I stream an answer?",
        "How can I get tokens as they come?",
        "How do I turn streaming on?",
        "Can answers be streamed?",
    ),
    "Set seed in the request; greedy and seeded answers repeat exactly.": (
        "How do I get the same answer twice?",
        "How can I make answers reproducible?",
        "Can I repeat an answer exactly?",
        "Is there a seed?",
    ),
    "Up to 60 seconds after its end, at /v1/chat/completions/{id}.": (
        "How long is an answer kept?",
        "How long can I read an answer again?",
        "When are answers deleted?",
        "Can I fetch an answer later?",
    ),
    "POST /v1/chat/completions.": (
        "Which endpoint do I call to chat?",
        "Where do I send a question?",
        "Which URL is for chat?",
        "What is the chat endpoint?",
    ),
    "GET /health/live and GET /health/ready.": (
        "How do I check its health?",
        "Is there a health check?",
        "Which endpoints tell the health?",
        "Where are the probes?",
    ),
    "Millrace is written in Python, with kernels in Triton.": (
        "In which language is Millrace written?",
        "What is Millrace written in?",
        "Which programming language does it use?",
        "Is Millrace written in Python?",
    ),
    "Apache-2.0.": (
        "Which licence does Millrace have?",
        "What is the license?",
        "Under which licence is it?",
        "How is it licensed?",
    ),
    "It paints the time into each frame, so that the model reads it from the picture.": (
        "How does the model know the time in a video?",
        "How are timestamps given?",
        "What is painted into video frames?",
        "How does it see the time of a frame?",
    ),
    "The tokens are the truth: all before and after follows from the request and its tokens.": (
        "What is the main idea of the design?",
        "What is the one idea?",
        "What is the design built on?",
        "What is the principle of Millrace?",
    ),
    "Because streams keep work outside of processes, so each stage can be stopped and scaled alone.": (
        "Why does it use Redis Streams?",
        "Why are there streams between services?",
        "Why is Redis in the middle?",
        "What are the streams good for?",
    ),
    "With the flag --quantization wint8 or wint4.": (
        "How do I quantise the model?",
        "How can I use less memory for weights?",
        "Which flag turns quantization on?",
        "How do I get 4-bit weights?",
    ),
    "OpenAI's API: any client of OpenAI's works.": (
        "Which API does Millrace speak?",
        "Which clients can I use?",
        "Is it compatible with OpenAI?",
        "Can I use the openai package?",
    ),
    "Put it into a message as image_url, as a link or as base64.": (
        "How do I send a picture?",
        "How can I ask about an image?",
        "How are images sent?",
        "How do I attach a picture?",
    ),
    "Put it into a message as video_url.": (
        "How do I send a video?",
        "How can I ask about a video?",
        "How are videos sent?",
        "How do I attach a video?",
    ),
}
PREFIXES = ("", "", "", "Please tell me: ", "Question: ", "Quick question. ", "Hi! ", "One more thing: ")


def _table() -> dict[str, list[tuple[str, str]]]:
    """For each subject, its core questions and their answer."""
    table: dict[str, list[tuple[str, str]]] = {}
    for subject, answer in DEFINITIONS.items():
        table[subject] = [(form.format(subject), answer) for form in WHAT]
    for name, (default, service) in SETTINGS.items():
        table[f"the default of {name}"] = [
            (form.format(name), f"The default of {name} is {default}.") for form in DEFAULT
        ]
        table[f"the owner of {name}"] = [(form.format(name), f"{name} is a setting of {service}.") for form in WHOSE]
    for status, meaning in STATUSES.items():
        table[f"status {status}"] = [(form.format(status), f"Status {status} means that {meaning}.") for form in MEANS]
    for answer, forms in QUESTIONS.items():
        subject = forms[0].rstrip("?.").lower()
        table[subject] = [(form, answer) for form in forms]
    return table


TABLE = _table()
_SUBJECTS = sorted(TABLE)
_FORMS = list(chain.from_iterable(TABLE.values()))


def generate(rng: random.Random) -> Sample:
    """A question about Millrace, perhaps with a few words before it."""
    subject = rng.choice(_SUBJECTS)
    core, answer = rng.choice(TABLE[subject])
    asked = rng.choice(PREFIXES) + core
    if rng.random() < 0.15:
        asked = asked.rstrip("?.")
    elif rng.random() < 0.15:
        asked = asked.lower()
    return Sample("millrace", core, user(asked), answer, f"The question is about {subject}.")
