-- Send one message to each gateway. A gateway that is gone has no stream, and gets none.
-- KEYS: shards, deltas...
-- ARGV: fence, length of a stream, v, m...
-- requires: fence
for i = 2, #KEYS do
  redis.call(
    'XADD', KEYS[i], 'NOMKSTREAM', 'MAXLEN', '~', ARGV[at], '*', 'v', ARGV[at + 1], 'm', ARGV[at + i]
  )
end
