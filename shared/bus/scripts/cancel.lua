-- Mark records without a finish as cancelled, and broadcast it if any was marked.
-- KEYS: shards, control, record...
-- ARGV: fence, length of control, v, m
-- Returns how many were marked.
-- requires: fence
-- requires: typed
local marked = 0
for i = 3, #KEYS do
  if is_a('hash', KEYS[i]) and redis.call('HEXISTS', KEYS[i], 'finish') == 0 then
    marked = marked + redis.call('HSET', KEYS[i], 'cancelled', '1')
  end
end
if marked > 0 then
  redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[at], '*', 'v', ARGV[at + 1], 'm', ARGV[at + 2])
end
return marked
