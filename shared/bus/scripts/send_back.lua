-- Replace an entry of `generate` by the Encode that its record keeps until then.
-- KEYS: stream, record, encode
-- ARGV: consumer group, consumer, entry id, most returns of one request, id of the request
-- Returns 'done', 'lost' or 'never'.
-- requires: entries
-- requires: typed
-- requires: note_entry
if not owns(ARGV[3]) then return 'lost' end
local source = is_a('hash', KEYS[2]) and redis.call('HGET', KEYS[2], 'encode')
local returned = source and redis.pcall('HINCRBY', KEYS[2], 'returned', 1)
if type(returned) ~= 'number' or returned > tonumber(ARGV[4]) then return 'never' end
ack(ARGV[3])
local version = '1'
if string.byte(source) == 0xC1 then version, source = tostring(string.byte(source, 2)), string.sub(source, 3) end
local entry = redis.call('XADD', KEYS[3], '*', 'v', version, 'm', source, 'r', ARGV[5])
redis.call('HDEL', KEYS[2], 'encode')
note_entry(KEYS[2], KEYS[3], entry)
return 'done'
