-- Replace an entry of `encode` by one of `generate`, unless the request is cancelled or was forwarded with
-- another prompt.
-- KEYS: stream, record, generate
-- ARGV: consumer group, consumer, entry id, v, m of the Generate, the Encode, fingerprint of the prompt, id
-- of the request
-- Returns 'done', 'lost', 'unwanted' or 'changed'.
-- requires: entries
-- requires: typed
-- requires: note_entry
if not owns(ARGV[3]) then return 'lost' end
if not is_a('hash', KEYS[2]) then return 'unwanted' end
local request, cancelled, made = unpack(redis.call('HMGET', KEYS[2], 'request', 'cancelled', 'made'))
if not request or cancelled then return 'unwanted' end
if made and made ~= ARGV[7] then return 'changed' end
ack(ARGV[3])
local entry = redis.call('XADD', KEYS[3], '*', 'v', ARGV[4], 'm', ARGV[5], 'r', ARGV[8])
redis.call('HSET', KEYS[2], 'encode', ARGV[6], 'made', ARGV[7])
note_entry(KEYS[2], KEYS[3], entry)
return 'done'
